# The YAML that qubes-issues #8102 asks for, with the driver of R3.2: no pillar but a state file, to
# be put into a file_root. qvm-pool is another name for qubes_pool; options may be a list of maps.
pool-name:
  qvm-pool.present:
    - driver: xen
    - options:
        - dir_path: /opt/pool

other-pool-name:
  qvm-pool.absent: []
