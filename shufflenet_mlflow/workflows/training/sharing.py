"""What a distributed job begins with: found by its leader, received by its other processes.

They need no folder in common, and no access to MLflow.
"""

from dataclasses import replace

from shufflenet_mlflow.runtime.distributed import World
from shufflenet_mlflow.workflows.training.request import TrainRequest
from shufflenet_mlflow.workflows.training.resume import InitialWeights, ResumePoint


def share_beginning(
    world: World, request: TrainRequest, start: ResumePoint | None, init: InitialWeights | None
) -> None:
    """Send the others what was found; the counterpart of `receive_beginning`."""
    if world.size == 1:
        return
    world.from_leader((request.resume, request.new_run, request.inherited, _light(start), _light(init)))
    for found in (start, init):
        world.payload_from_leader(found.payload if found is not None else None)


def receive_beginning(
    world: World, request: TrainRequest
) -> tuple[TrainRequest, ResumePoint | None, InitialWeights | None]:
    """What the leader found, with the request as it understood it."""
    own = (request.resume, request.new_run, request.inherited, _NO_START, _NO_INIT)
    resume, new_run, inherited, start, init = world.from_leader(own)
    request = replace(request, resume=resume, new_run=new_run, inherited=inherited)
    payload = world.payload_from_leader(None)
    if start is not None and payload is not None:
        start = replace(start, payload=payload)
    payload = world.payload_from_leader(None)
    if init is not None and payload is not None:
        init = replace(init, payload=payload)
    return request, start, init


_NO_START: ResumePoint | None = None
_NO_INIT: InitialWeights | None = None


def _light(found: "ResumePoint | InitialWeights | None") -> "ResumePoint | InitialWeights | None":
    """Without the checkpoint's content, which is sent on its own."""
    return None if found is None else replace(found, payload={})
