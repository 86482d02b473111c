"""The peer of elpv_time: frozen features and a small head in plain torch, as a careful person writes it.

The same network, stage, view, precision and head as the recipe `quick-probe`. Prints the validation accuracy.
"""

import os

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

import isthmus
from isthmus.data.sources import open_data

torch.set_num_threads(os.cpu_count())
torch.manual_seed(0)


class Cells(Dataset):
    def __init__(self, pictures):
        self.paths, self.labels = [pictures.name(i) for i in range(len(pictures))], pictures.labels

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = Image.open(self.paths[index]).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)), int(self.labels[index])


net = isthmus.load("demo").eval().bfloat16().to(memory_format=torch.channels_last)  # its batch norm is folded already
trunk = nn.Sequential(net.conv1, net.act1, net.maxpool, net.layer1, net.layer2, net.layer3)
mean, std = (255 * torch.tensor(each) for each in (net.preprocess.mean, net.preprocess.std))


@torch.inference_mode()
def features(pictures, workers):
    pooled, labels = [], []
    for images, truth in DataLoader(Cells(pictures), batch_size=32, num_workers=workers):
        x = ((images.flip(-1) - mean) / std).permute(0, 3, 1, 2).bfloat16()  # BGR
        maps = trunk(x)
        pooled.append(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1).float())
        labels.append(truth)
    return torch.cat(pooled), torch.cat(labels)


data = open_data("elpv:0")
workers = int(os.environ.get("WORKERS", "2"))
(x, y), (x_val, y_val) = (features(each, workers) for each in (data.train, data.val))
centre, scale = x.mean(0), x.std(0) + 1e-6
x, x_val = (x - centre) / scale, (x_val - centre) / scale
head = nn.Sequential(nn.Linear(x.shape[1], 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 2))
epochs, batch = 30, 128
optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=1e-2, fused=True)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * (len(x) // batch), pct_start=0.05)
for _ in range(epochs):
    for chosen in torch.randperm(len(x))[: len(x) // batch * batch].view(-1, batch):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
head.eval()
print(float((head(x_val).argmax(1) == y_val).float().mean()))
