# Many machines, one pillar tree: everyone gets base, a minion id or a grain adds to it.
base:
  '*':
    - base
  'laptop*':
    - laptop
  'qubes_disk:raid':
    - match: grain
    - raid
