# What R3.2 ships: one pool, named default, with the driver xen at /var/lib/qubes.
qubes_storage:
  pools:
    default:
      driver: xen
