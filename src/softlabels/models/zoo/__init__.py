"""The papers' networks for small images; each module registers its models with timm."""

from softlabels.models.zoo import densenet_small as densenet_small
from softlabels.models.zoo import mobilenet_small as mobilenet_small
from softlabels.models.zoo import preact_resnet as preact_resnet
from softlabels.models.zoo import resnet_cifar as resnet_cifar
from softlabels.models.zoo import resnet_small as resnet_small
from softlabels.models.zoo import shufflenet_small as shufflenet_small
from softlabels.models.zoo import vgg_small as vgg_small
from softlabels.models.zoo import vit_small as vit_small
