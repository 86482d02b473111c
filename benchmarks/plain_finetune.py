"""The other peer of elpv_time: every layer trained, with the settings that timm's train.py has unless told otherwise.

SGD with Nesterov momentum 0.9, rate 0.1 for 256 pictures, warm-up of 5 epochs from 1e-5, batches of 128, weight decay
2e-5, label smoothing 0.1, random crops of 8 to 100 % with colour jitter 0.4 and flips; kinder than they are: bf16
autocast and channels_last. Ends, printing accuracy and epoch, at `target` or when it is killed.
"""

import os
import sys

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import isthmus
from isthmus.data.sources import open_data
from isthmus.data.transform import normalise
from isthmus.nn.fold import insert_batchnorm

TARGET = float(sys.argv[1])
torch.set_num_threads(os.cpu_count())
torch.manual_seed(0)
crops = v2.Compose(
    [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4), v2.PILToTensor()]
)
whole = v2.Compose([v2.Resize((224, 224)), v2.PILToTensor()])


class Cells(Dataset):
    def __init__(self, pictures, transform):
        self.paths, self.labels = [pictures.name(i) for i in range(len(pictures))], pictures.labels
        self.transform = transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(Image.open(self.paths[index]).convert("RGB")), int(self.labels[index])


data, net = open_data("elpv:0"), isthmus.load("demo", num_classes=2, head="new")
train = DataLoader(Cells(data.train, crops), batch_size=128, shuffle=True, drop_last=True, num_workers=2)
val = DataLoader(Cells(data.val, whole), batch_size=128, num_workers=2)
record = net.preprocess
# Networks with their batch norm folded away do not train at such rates, so it is put back first.
net = insert_batchnorm(net, [normalise(next(iter(val))[0], record)]).to(memory_format=torch.channels_last)
decayed = [[p for p in net.parameters() if (p.ndim > 1) == many] for many in (True, False)]
groups = [{"params": decayed[0], "weight_decay": 2e-5}, {"params": decayed[1], "weight_decay": 0.0}]
optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
for epoch in range(300):
    for group in optimizer.param_groups:
        group["lr"] = 1e-5 + (0.05 - 1e-5) * min(epoch / 5, 1)
    net.train()
    for images, labels in train:
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(normalise(images, record).contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.1).backward()
        optimizer.step()
    net.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        hits = sum(int((net(normalise(images, record)).argmax(1) == labels).sum()) for images, labels in val)
    accuracy = hits / len(data.val)
    print(epoch + 1, accuracy, file=sys.stderr, flush=True)
    if accuracy >= TARGET:
        break
print(accuracy)
