# A machine of one's own: a template, net and proxy VMs, and VMs in two pools.
# Sizes are "at least": an image that is smaller grows, one that is larger stays.
qubes_storage:
  pools:
    default:
      driver: xen
    ssd:
      driver: xen
      dir_path: /opt/ssd
      min_free: 1GiB                     # refuse to create or grow below this

  vms:
    work:
      template: fedora-23
      label: green
      pool: ssd
      volumes: {private: 20GiB}

    # Templates come first whatever the order here: whoever runs on one requires it.
    fedora-23:
      klass: TemplateVM
      volumes: {root: 20GiB}

    sys-net:
      klass: NetVM
      template: fedora-23

    sys-firewall:
      klass: ProxyVM
      template: fedora-23

    personal:
      template: fedora-23
      label: yellow

    # A copy of the template, with a root of its own.
    build:
      klass: StandaloneVM
      template: fedora-23
      label: blue
      pool: ssd

    windows:
      klass: HVM
      label: gray
      volumes: {root: 60GiB, private: 10GiB}
