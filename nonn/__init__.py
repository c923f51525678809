"""Network of Neural Networks: one small student per device, distilled from one large teacher.

Implements the method of Bhardwaj et al., *Memory- and Communication-Aware Model Compression for
Distributed Deep Learning Inference on IoT* (2019), https://arxiv.org/abs/1907.11804, as a
pipeline of stages. Each stage is a module of `nonn.stages` and a stage of ``dvc.yaml``, from which
the Snakemake rules are generated; most have a section of ``params.yaml``.
"""

__version__ = "0.1.0"
