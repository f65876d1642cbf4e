# Machines whose minion id begins with laptop: a small pool, and a VM for the road.
qubes_storage:
  pools:
    travel:
      driver: xen
      dir_path: /opt/travel
  vms:
    travel:
      template: fedora-23
      label: orange
      pool: travel
