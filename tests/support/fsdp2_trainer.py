"""Train under FSDP2 on the CPU.

Accelerate uses FSDP2 only if it takes the processes for those of an accelerator, so this program tells it that they are;
everything else is accelerate's own: it shards the model and the optimizer over the gloo processes.
"""

import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).parents[2]))
original = PartialState.__init__


def take_for_accelerators(self: PartialState, *args: object, **options: object) -> None:
    original(self, *args, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = take_for_accelerators

from train_accelerate import main  # noqa: E402

main()
