# The two pools of the manual: default, and foo in a directory of its own.
# The parent of a pool's directory, here /opt, has to be there.
qubes_storage:
  pools:
    default:
      driver: xen
    foo:
      driver: xen
      dir_path: /opt/qubes-vm
