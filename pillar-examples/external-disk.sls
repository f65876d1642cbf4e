# A pool on a disk that is not always there. While /mnt/backup is not a mount point nothing is made
# below it, and while less than 20 GiB are free nothing is created, cloned or grown there.
qubes_storage:
  pools:
    default:
      driver: xen
    backup:
      driver: xen
      dir_path: /mnt/backup/qubes
      require_mount: /mnt/backup
      min_free: 20GiB
    old:
      absent: true                       # refused while VMs lie in it; images are never deleted

  vms:
    archive:
      klass: StandaloneVM
      label: gray
      pool: backup
      volumes:
        private:
          size: 100GiB
