"""Loading the teacher, trained or foreign, for later stages.

A teacher is a module in evaluation mode, of ``n_features``, that takes uint8 images (B, channels, H, W) of the data set
and returns feature vectors (B, n_features) and logits (B, C), as `nonn.training.networks.predict` needs it; ``mirrors``
says whether it looks at the mirror image, too. Only teachers of our own families have attention maps.
"""

from __future__ import annotations

from torch import Tensor

from nonn.core.architecture import Architecture
from nonn.core.artifacts import TeacherInfo
from nonn.core.files import intact, read_json
from nonn.core.paths import Paths
from nonn.data.dataset import load_teacher_dataset
from nonn.data.tensors import read_tensors
from nonn.teachers.foreign import ForeignTeacher, load_foreign
from nonn.training.networks import ConvNet


def load_teacher(paths: Paths) -> ConvNet | ForeignTeacher:
    """The teacher of the experiment, ready to predict."""
    info, data = read_json(paths.teacher_info, TeacherInfo), load_teacher_dataset(paths)
    with intact(paths.teacher):
        if info["architecture"] is None:
            return load_foreign(info, read_tensors(paths.teacher), data)
        model = ConvNet(Architecture(**info["architecture"]), data.channels, data.n_classes)
        model.load_state_dict(read_tensors(paths.teacher))
    return model.eval()


def tensors_of(model: ConvNet | ForeignTeacher) -> dict[str, Tensor]:
    """What is stored of a teacher, by name."""
    return model.body.tensors() if isinstance(model, ForeignTeacher) else model.state_dict()
