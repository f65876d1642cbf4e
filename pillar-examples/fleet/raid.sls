# Machines with the grain qubes_disk: raid, which work by the host's own name.
qubes_storage:
  pools:
    raid:
      driver: xen
      dir_path: /srv/raid-{{ grains['id'] }}
  vms:
    {%- for number in range(1, 4) %}
    build-{{ number }}:
      template: fedora-23
      pool: raid
      label: blue
    {%- endfor %}
