# What every machine has. The name of the default pool's driver, and a template for all.
qubes_storage:
  pools:
    default:
      driver: xen
  vms:
    fedora-23:
      klass: TemplateVM
    work:
      template: fedora-23
      label: green
