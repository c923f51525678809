"""The text of an experiment that `nonn new` writes, in parts to be filled in."""

TEMPLATE = """\
# Written by `nonn new`. What is not here is as in mnist5k.yaml, and stands in params.yaml with its comments.
experiment: {name}
numerics: fast                # all that this machine offers; portable: the same bytes on other processors too

# The budget of each kind of device. `nonn check` says what is wrong with one.
devices: {devices}

networks:
  {network}:
    devices: {members}
    seeds: 1                  # trainings; 3 or more show the spread
    baselines: {{kd: {n_devices}}}        # so many make an ensemble, the fairest comparison: see docs/parameters.md

dataset:
  source: {source}
  size: {size}{size_comment}
  validation: 0.1             # of the images, on which every choice is made
  test: 0.2                   # where the source has no test images of its own
{teacher}
signals:
  views: 4                    # augmented views of each image; more cost time and disk, and help small data sets
  augment: {augment}
  threads: {threads}

graph:
  top_k: 25                   # filters of each image that take part in the graph

design:
  family: {family}
  depths: {depths}
  min_width: {min_width}
  max_width: {max_width}
  precision: {precision}
{design}
distill:
  epochs: 20
  batch_size: 64
  lr: 0.1
"""
#: Without images and devices: the default experiment, to be edited.
PLAIN = """\
# Written by `nonn new`. What is not here is as in mnist5k.yaml, and stands in params.yaml with its comments.
experiment: {name}
"""
TRAINED = """
# No teacher was given, so one is trained: see docs/data-and-teacher.md for a teacher of your own.
teacher:
  architecture: {{family: {family}, widths: {widths}, depth: 2}}
  epochs: 30
  batch_size: 64
  lr: 0.1
  augment: {augment}
  threads: {threads}
"""
IMPORTED = """
teacher:
  source: {source}
  weights: {weights}
  threads: {threads}{size}
"""
