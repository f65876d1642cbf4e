# Qubes OS R4, over the Admin API: the same layout, with R4's drivers and classes. The sizes replace
# as many hand-written "cmd.run: qvm-volume extend NAME:private SIZE", which are not guarded.
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
    {%- for name, size in {"personal": "20GiB", "mail": "10GiB", "chat": "5GiB", "web": "5GiB",
                           "music": "40GiB", "photos": "100GiB", "vault-2": "2GiB"}.items() %}
    {{ name }}:
      template: fedora
      label: yellow
      volumes: {private: {{ size }}}
    {%- endfor %}
    projects:
      template: fedora
      label: blue
      pool: btrfs                        # private and volatile; root stays the template's
      volumes:
        private: {size: 30GiB, revisions_to_keep: 3}
