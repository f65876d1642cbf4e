#!jinja|yaml
{#-
Pools and VMs from pillar qubes_storage: one state a pool, one a VM, and on R4 one for default_pools.

The only file that reads the pillar layout. Order in pillar does not matter: a VM requires its pool
and its template, a pool the one that it lies in, and what is absent goes last: VMs before those
that they use (a template, a NetVM, a template of DispVMs), and then pools. A VM only goes once
those that are made of it are there, and a pool once those went that may be in it; no state requires
what is absent, so there is no circle.

(It is not #!py: Salt would load it as the Python module qubes_storage, in place of the core.)
#}
{%- set vm_keys = ["klass", "template", "label", "pool", "volumes", "clone_from", "root_copy_from",
                   "root_move_from", "migrate", "create_only"] %}
{#- The drivers known here, R3.2's and R4's, and their options; a driver of one's own has others. #}
{%- set drivers = ["xen", "reflink", "btrfs", "file", "file-reflink", "lvm_thin", "zfs",
                   "linux-kernel", "callback"] %}
{%- set pool_keys = ["driver", "class", "require_mount", "min_free", "dir_path",
                     "revisions_to_keep", "setup_check", "ephemeral_volatile",
                     "snap_on_start_forensics", "volume_group", "thin_pool", "container",
                     "conf_id"] %}
{%- set default_keys = ["default_pool", "default_pool_root", "default_pool_private",
                        "default_pool_volatile", "default_pool_kernel"] %}
{%- set layout = pillar.get("qubes_storage") or {} %}
{%- set present = {} %}
{%- set gone = {"vms": {}, "pools": {}} %}
{%- set wrong = [] %}
{%- set parts = {"pools": {}, "vms": {}, "default_pools": {}} %}
{#- As YAML, which is what the pillar is written in. #}
{%- macro told(value) %}{{ (value | yaml).split() | join(" ") }}{% endmacro %}
{%- macro cure(value) %}
  {%- if value is sequence and value is not string and value is not mapping %}; leave out the dashes
  {%- endif %}
{%- endmacro %}
{%- if layout is not mapping %}
  {%- do wrong.append("pillar qubes_storage is " ~ told(layout) ~ ", not a map of pools and vms"
                      ~ cure(layout)) %}
  {%- set layout = {} %}
{%- endif %}
{%- for key, part in layout.items() %}
  {%- if key not in parts %}
    {%- do wrong.append("pillar qubes_storage has " ~ key ~ "; it takes pools, vms and default_pools") %}
  {%- elif part is not none and part is not mapping %}
    {%- do wrong.append("pillar qubes_storage:" ~ key ~ " is " ~ told(part)
                        ~ ", not a map by name" ~ cure(part)) %}
  {%- elif key == "default_pools" %}
    {%- set unknown = (part or {}).keys() | reject("in", default_keys) | map("string") | sort %}
    {%- if unknown %}
      {%- do wrong.append("pillar qubes_storage:default_pools has " ~ unknown | join(", ")
                          ~ "; it takes " ~ default_keys | join(", ")) %}
    {%- else %}
      {%- do parts.default_pools.update(part or {}) %}
    {%- endif %}
  {%- else %}
    {%- for name, config in (part or {}).items() %}
      {%- set flags = ["absent", "purge"] + (["migrate", "create_only"] if key == "vms" else []) %}
      {%- set neither = [] %}
      {%- for flag in (flags if config is mapping else [])
            if config.get(flag) not in [none, true, false] %}
        {%- do neither.append("pillar qubes_storage:" ~ key ~ ":" ~ name ~ ":" ~ flag ~ " is "
                              ~ told(config[flag]) ~ ", neither true nor false"
                              ~ ("; write it without quotes" if config[flag] is string else "")) %}
      {%- endfor %}
      {%- if neither %}
        {%- do wrong.extend(neither) %}
      {%- elif config is none or config is mapping %}
        {%- if config is mapping and "absent" in config and not config.absent %}
          {%- set config = dict(config.items() | rejectattr("0", "in", ["absent", "purge"])) %}
        {%- endif %}
        {#- Salt takes the ID for a name that is no text; as text, the modules refuse it. #}
        {%- do parts[key].update({name | string: config or {}}) %}
      {%- else %}
        {%- do wrong.append("pillar qubes_storage:" ~ key ~ ":" ~ name ~ " is " ~ told(config)
                            ~ ", not a map of options" ~ cure(config)) %}
      {%- endif %}
    {%- endfor %}
  {%- endif %}
{%- endfor %}

{%- for comment in wrong %}
  {%- do present.update({comment: comment}) %}
{%- endfor %}

{%- set made_of = {} %}
{%- set leaving = [] %}
{%- for name, config in parts.vms.items() %}
  {%- if config.get("absent") or config.get("migrate") %}
    {%- do leaving.append("VM " ~ name) %}
  {%- endif %}
  {%- for source in ["template", "clone_from", "root_copy_from", "root_move_from"]
        if config.get(source) is string and not config.get("absent") %}
    {#- An image may lie in the directory of a VM, which has its name. #}
    {%- for other in config[source].split("/") %}
      {%- do made_of.setdefault(other, []).append("VM " ~ name) %}
    {%- endfor %}
  {%- endfor %}
{%- endfor %}

{%- set places = {} %}
{%- for name, config in parts.pools.items() if not config.get("absent") %}
  {%- set path = config.get("dir_path") or ("/var/lib/qubes" if name == "default") %}
  {%- if path is string %}
    {%- do places.update({name: path.rstrip("/")}) %}
  {%- endif %}
{%- endfor %}
{%- for name, config in parts.pools.items() %}
  {%- if config.get("absent") %}
    {%- do gone.pools.update({"pool " ~ name: {"qubes_pool.absent": [
          {"name": name}, {"purge": config.get("purge", False)}, {"require": leaving}]}}) %}
    {%- set unknown = config.keys() | map("string") | map("lower")
                      | reject("in", pool_keys + ["absent", "purge"]) | sort %}
    {%- if unknown and not config.get("class") and config.get("driver") in [none] + drivers %}
      {%- do gone.pools.update({"pool " ~ name: "pool " ~ name ~ " that is absent takes no "
                                                ~ unknown | join(", ")}) %}
    {%- endif %}
  {%- else %}
    {%- set require = [] %}
    {%- for other in places if places.get(name, "").startswith(places[other] ~ "/") %}
      {%- do require.append("pool " ~ other) %}
    {%- endfor %}
    {%- do present.update({"pool " ~ name: {"qubes_pool.present": [
          {"name": name}, {"options": config}, {"require": require}]}}) %}
    {%- for key, value in config.items() if value is iterable and value is not string %}
      {%- do present.update({"pool " ~ name: "pool " ~ name ~ ": " ~ key ~ " is " ~ told(value)
            ~ ", no text or number; write each option as a line of the pool" ~ cure(value)}) %}
    {%- endfor %}
  {%- endif %}
{%- endfor %}

{%- if parts.default_pools %}
  {%- set require = [] %}
  {%- for pool in parts.default_pools.values()
        if pool is string and pool in parts.pools and not parts.pools[pool].get("absent") %}
    {%- do require.append("pool " ~ pool) %}
  {%- endfor %}
  {%- set arguments = [{"require": require | unique | list}] %}
  {%- for key, pool in parts.default_pools.items() %}
    {%- do arguments.append({key: pool}) %}
  {%- endfor %}
  {%- do present.update({"default pools": {"qubes_pool.default": arguments}}) %}
{%- endif %}

{%- set templates = [] %}
{%- for name, config in parts.vms.items() if config.get("klass") == "TemplateVM" %}
  {%- do templates.append(name) %}
{%- endfor %}
{%- for name, config in parts.vms.items() %}
  {%- if config.get("absent") %}
    {%- set unknown = config.keys() | reject("in", vm_keys + ["absent", "purge"])
                      | map("string") | sort %}
    {%- if wrong or unknown %}
      {#- What is wrong may be what was to be made of it. #}
      {%- set comment = "VM " ~ name ~ (" that is absent takes no " ~ unknown | join(", ")
                        if unknown else " stays while the pillar is wrong") %}
      {%- do gone.vms.update({"VM " ~ name: comment}) %}
    {%- else %}
      {%- do gone.vms.update({"VM " ~ name: {"qubes_vm.absent": [
            {"name": name}, {"purge": config.get("purge", False)},
            {"require": made_of.get(name, []) | unique | list}]}}) %}
    {%- endif %}
  {%- else %}
    {%- set unknown = config.keys() | reject("in", vm_keys) | map("string") | sort %}
    {%- if unknown %}
      {%- set comment = "VM " ~ name ~ " takes no " ~ unknown | join(", ") ~ "; it takes "
                        ~ vm_keys | join(", ") %}
      {%- do present.update({"VM " ~ name: comment}) %}
    {%- else %}
      {%- set require = [] %}
      {%- set pools = [config.get("pool") or "default"] %}
      {%- for volume in (config.volumes.values() if config.get("volumes") is mapping else [])
            if volume is mapping %}
        {%- do pools.append(volume.get("pool")) %}
      {%- endfor %}
      {%- if config.get("pool") is none and parts.default_pools %}
        {%- do require.append("default pools") %}
      {%- endif %}
      {%- for pool in pools | select("string") | unique
            if pool in parts.pools and not parts.pools[pool].get("absent") %}
        {%- do require.append("pool " ~ pool) %}
      {%- endfor %}
      {%- set sources = [config.get("template"), config.get("clone_from")]
                        | select("string") | list %}
      {#- Who declares neither runs on the default template, maybe the first that this run makes. #}
      {%- set runs = (config.get("klass") or "AppVM") in ["AppVM", "NetVM", "ProxyVM"] %}
      {%- for other in sources or (templates if runs else []) %}
        {%- if other in parts.vms and other != name and not parts.vms[other].get("absent") %}
          {%- do require.append("VM " ~ other) %}
        {%- endif %}
      {%- endfor %}
      {%- set arguments = [{"name": name}, {"require": require}] %}
      {%- for key, value in config.items() %}
        {%- do arguments.append({key: value}) %}
      {%- endfor %}
      {%- do present.update({"VM " ~ name: {"qubes_vm.present": arguments}}) %}
      {%- set volumes = config.volumes if config.get("volumes") is mapping else {} %}
      {%- for key, value in (config.items() | list) + (volumes.items() | list) if cure(value) %}
        {%- do present.update({"VM " ~ name: "VM " ~ name ~ ": " ~ key ~ " is " ~ told(value)
                               ~ ", no list" ~ cure(value)}) %}
      {%- endfor %}
    {%- endif %}
  {%- endif %}
{%- endfor %}
{#- Who uses whom tells the machine; the pillar only says what goes. #}
{%- set names = [] %}
{%- for name, config in parts.vms.items() if config.get("absent") %}
  {%- do names.append(name) %}
{%- endfor %}
{%- if names and "qubes_vm.removal_order" in salt %}
  {%- set names = salt["qubes_vm.removal_order"](names) %}
{%- endif %}
{%- for name in names %}
  {%- do present.update({"VM " ~ name: gone.vms["VM " ~ name]}) %}
{%- endfor %}
{%- do present.update(gone.pools) %}
{%- if not present %}
  {%- do present.update({"nothing is declared in pillar qubes_storage": {"test.nop": []}}) %}
{%- endif %}
{%- for id, body in present.items() %}
  {%- if body is string %}
    {#- What is wrong; in test mode Salt shows no comment of it, but a name. #}
    {%- set body = {"test.fail_without_changes": [{"name": body}, {"comment": body}]} %}
  {%- endif %}
{#- An explicit key, for YAML takes no other that is longer than 1024 characters. #}
? {{ id | json }}
: {{ body | yaml }}
{%- endfor %}
