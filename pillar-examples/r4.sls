# Qubes OS R4, over the Admin API: the same layout, with R4's drivers and classes. The sizes stand for
# sixteen hand-written "cmd.run: qvm-volume extend NAME:private SIZE", of which none was guarded: a
# volume that is smaller grows, and one that is larger never shrinks.
qubes_storage:
  pools:
    fast:
      driver: file-reflink
      dir_path: /mnt/ssd/fast            # on btrfs or xfs; its parent has to be there
      revisions_to_keep: 2
      min_free: 1GiB

  default_pools:
    default_pool: fast

  vms:
    {%- for size, names in {
        "2GiB": ["vault-2", "keys"],
        "5GiB": ["chat", "web", "bank", "shop", "forum"],
        "10GiB": ["mail", "news", "notes", "wiki"],
        "20GiB": ["personal", "school"],
        "40GiB": ["music", "code"]}.items() %}
    {%- for name in names %}
    {{ name }}:
      template: fedora
      label: yellow
      volumes: {private: {{ size }}}
    {%- endfor %}
    {%- endfor %}
    projects:
      template: fedora
      label: blue
      pool: btrfs                        # private and volatile; root stays the template's
      volumes:
        private: {size: 30GiB, revisions_to_keep: 3}
