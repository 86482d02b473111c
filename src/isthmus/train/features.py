"""Features of a frozen trunk: every picture and view goes through the network once, and never again while cached."""

from dataclasses import replace

import torch
from torch import Tensor

from isthmus.arch.plan import plan
from isthmus.arch.spec import HeadSpec
from isthmus.data.pictures import Pictures
from isthmus.nn.network import ResNet
from isthmus.runtime import Machine, Precision
from isthmus.train.outputs import PrefixOutputs, turns_of_views
from isthmus.train.prefix import Prefix
from isthmus.train.reporter import Reporter

__all__ = ["extract", "with_head"]


def with_head(net: ResNet, head: HeadSpec, num_classes: int) -> ResNet:
    """The same trunk under another head, its weights shared, stages that the head does not need left out."""
    depth = max((net.stages.index(tap) + 1 if tap in net.stages else 1) for tap in head.taps)  # at least one stage
    stages = net.spec.stages if "last" in head.taps else net.spec.stages[:depth]
    if net.spec.preact:  # the final norm fits the last stage alone
        stages = net.spec.stages
    spec = replace(net.spec, head=head, num_classes=num_classes, stages=stages)
    other = ResNet(plan(spec, net.plan.image_size))
    state = other.state_dict()
    for key, value in net.state_dict().items():
        if key in state and not key.startswith("fc."):
            state[key] = value
    other.load_state_dict(state, assign=True)
    other.preprocess, other.classes = net.preprocess, net.classes
    return other.train(net.training)


def extract(net: ResNet, pictures: Pictures, machine: Machine, precision: Precision, reporter: Reporter) -> Tensor:
    """Pooled features (views, N, features) of `pictures` in the views of `net.preprocess`, fp32.

    They are cached, unless `fingerprint` gives None; interrupted, those computed so far are kept.
    """
    record, prefix = net.preprocess, Prefix(net, "trunk", machine, precision)
    outputs = PrefixOutputs(net, prefix, pictures, record, turns_of_views(record.views), reporter)
    if outputs.rows.path is None:
        reporter.say(
            "features are not kept for next time: a class of your own in the network is not at the top level of a file"
        )
    views, done = len(record.views), 0
    values = torch.empty(len(pictures) * views, net.plan.num_features)
    for rows, found in outputs.all():
        values[torch.from_numpy(rows)] = torch.from_numpy(found).view(torch.float32)
        done += len(rows)
        reporter.progress(f"features in {views} view{'s' * (views > 1)}", done // views, len(pictures))
    return values.view(len(pictures), views, -1)[torch.from_numpy(outputs.place)].transpose(0, 1)
