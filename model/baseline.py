"""The convolutional networks the paper compares with, of its sizes."""

from torch import Tensor, nn

from .config import Architecture
from .losses import Output


class CNN(nn.Module):
    """The paper's MNIST baseline (section 5): three 5 x 5 convolutions of 256, 256, 128 channels
    that keep the image's size, fully connected layers of 328 and 192 units, dropout.

    35,445,522 parameters for 28 x 28 images of 10 classes.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.layers = nn.Sequential(
            nn.Conv2d(a.in_channels, 256, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(256, 256, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(256, 128, 5, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128 * a.image_size**2, 328),
            nn.ReLU(),
            nn.Linear(328, 192),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(192, a.classes),
        )

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:
        """Logits of images [B, C, H, W]; nothing is reconstructed."""
        return Output(self.layers(images).float())


class PooledCNN(nn.Module):
    """The paper's MultiMNIST baseline (section 6.1): convolutions of 512 9 x 9 and 256 5 x 5
    kernels that keep the size, each followed by 2 x 2 max pooling, then a fully connected layer.

    With fewer hidden units and dropout it stands in for affNIST's ("with MaxPooling and DropOut",
    section 5.2), of which the paper gives no sizes.

    24,563,978 parameters for 36 x 36 images of 10 classes and 1,024 hidden units.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.layers = nn.Sequential(
            nn.Conv2d(a.in_channels, 512, 9, padding=4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(512, 256, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256 * (a.image_size // 4) ** 2, a.hidden),
            nn.ReLU(),
            nn.Dropout(a.dropout),
            nn.Linear(a.hidden, a.classes),
        )

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:
        """Logits of images [B, C, H, W]; nothing is reconstructed."""
        return Output(self.layers(images).float())
