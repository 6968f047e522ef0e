"""torchvision's and timm's models with random weights; both libraries are optional.

Each model is the family's own class, made small by its own constructor arguments (widths, blocks, image size), so that
all of its code runs while a growth takes a second. Where a class has no arguments for its widths (ResNet, SqueezeNet,
MNASNet) they are the real ones.
"""

# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.families import Example, Maker

CLASSES = 5


def _maker(make: Callable[[], nn.Module], size: int = 64, *, fixed: bool = False) -> Maker:
    """Square images of one size. ``fixed``: the model's arithmetic on image sizes is slow, or impossible, to trace."""

    def example() -> Example:
        images, others = (torch.randn(n, 3, size, size).double() for n in (2, 3))
        dynamic: Literal["all", "batch"] = "batch" if fixed else "all"
        return Example(make(), {}, {}, args=(images,), other_args=(others,), dynamic=dynamic)

    return example


# torchvision -------------------------------------------------------------------------------------------------------


def _resnet(block: str, **options: Any) -> nn.Module:
    from torchvision.models import resnet

    return resnet.ResNet(getattr(resnet, block), [1, 1, 1, 1], num_classes=CLASSES, **options)


def _wide_resnet() -> nn.Module:
    return _resnet("Bottleneck", width_per_group=128)


def _densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=4, block_config=(2, 2, 2, 2), num_init_features=8, bn_size=2, num_classes=CLASSES)


def _mobilenet_v2() -> nn.Module:
    from torchvision.models import MobileNetV2

    setting = [[1, 8, 1, 1], [2, 8, 2, 2], [2, 16, 1, 2]]
    return MobileNetV2(CLASSES, width_mult=0.25, inverted_residual_setting=setting)


def _mobilenet_v3() -> nn.Module:
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    setting = [
        InvertedResidualConfig(8, 3, 8, 8, True, "RE", 2, 1, 1.0),
        InvertedResidualConfig(8, 3, 24, 16, False, "RE", 2, 1, 1.0),
        InvertedResidualConfig(16, 5, 32, 16, True, "HS", 1, 1, 1.0),
    ]
    return MobileNetV3(setting, last_channel=24, num_classes=CLASSES)


def _efficientnet() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

    setting = [
        MBConvConfig(1, 3, 1, 8, 8, 1),
        FusedMBConvConfig(2, 3, 2, 8, 8, 1),
        MBConvConfig(6, 3, 2, 8, 16, 2),
        MBConvConfig(6, 5, 1, 16, 24, 1),
    ]
    return EfficientNet(setting, dropout=0.2, num_classes=CLASSES, last_channel=48)


def _shufflenet() -> nn.Module:
    from torchvision.models import ShuffleNetV2

    return ShuffleNetV2([2, 3, 2], [8, 16, 24, 32, 48], num_classes=CLASSES)


def _squeezenet() -> nn.Module:
    from torchvision.models import SqueezeNet

    return SqueezeNet("1_1", num_classes=CLASSES)


def _regnet() -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    params = BlockParams(
        depths=[1, 2],
        widths=[16, 32],
        group_widths=[8, 8],
        bottleneck_multipliers=[1.0, 1.0],
        strides=[2, 2],
        se_ratio=0.25,
    )
    return RegNet(params, num_classes=CLASSES, stem_width=8)


def _mnasnet() -> nn.Module:
    from torchvision.models import MNASNet

    return MNASNet(0.25, num_classes=CLASSES)


def _vgg() -> nn.Module:
    """VGG's layers as they are, an eighth as wide; the class itself has no argument for the width of its head."""
    from torchvision.models.vgg import VGG, cfgs, make_layers

    with torch.device("meta"):
        model = VGG(nn.Identity(), num_classes=CLASSES, init_weights=False)
    model.features = make_layers([c if isinstance(c, str) else c // 8 for c in cfgs["A"]], batch_norm=True)
    wide, dropout = nn.Linear(64 * 49, 32), nn.Dropout()
    model.classifier = nn.Sequential(
        wide, nn.ReLU(True), dropout, nn.Linear(32, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, CLASSES)
    )
    return model


def _convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    setting = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)]
    return ConvNeXt(setting, stochastic_depth_prob=0.1, layer_scale=0.5, num_classes=CLASSES)


def _swin(block: str = "SwinTransformerBlock", merging: str = "PatchMerging") -> nn.Module:
    from torchvision.models import swin_transformer

    return swin_transformer.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        num_classes=CLASSES,
        block=getattr(swin_transformer, block),
        downsample_layer=getattr(swin_transformer, merging),
    )


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES)


def _maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit(
        input_size=(64, 64),
        stem_channels=8,
        partition_size=4,
        block_channels=[8, 16],
        block_layers=[1, 2],
        head_dim=4,
        stochastic_depth_prob=0.1,
        num_classes=CLASSES,
    )


def _thin(conv: Any) -> Any:
    """The convolution block of GoogLeNet and Inception, an eighth as wide; images keep their three channels."""
    return lambda i, o, **options: conv(i if i == 3 else i // 8, o // 8, **options)


def _googlenet() -> nn.Module:
    from torchvision.models.googlenet import BasicConv2d, GoogLeNet, Inception, InceptionAux

    conv = _thin(BasicConv2d)
    blocks = [conv, partial(Inception, conv_block=conv), InceptionAux]
    model = GoogLeNet(CLASSES, aux_logits=False, init_weights=False, blocks=blocks)
    model.fc = nn.Linear(128, CLASSES)
    return model


def _inception() -> nn.Module:
    from torchvision.models import inception

    conv = _thin(inception.BasicConv2d)
    kinds = [getattr(inception, f"Inception{x}") for x in "ABCDE"]
    blocks = [conv, *(partial(k, conv_block=conv) for k in kinds), inception.InceptionAux]
    model = inception.Inception3(CLASSES, aux_logits=False, init_weights=False, inception_blocks=blocks)
    model.fc = nn.Linear(256, CLASSES)
    return model


# timm --------------------------------------------------------------------------------------------------------------


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
        return model

    return make


def _resnetv2_standardised() -> nn.Module:
    from timm.layers import GroupNormAct
    from timm.models.resnetv2 import ResNetV2

    norm = partial(GroupNormAct, num_groups=4)
    return ResNetV2([1, 1, 1], (16, 32, 64), num_classes=CLASSES, stem_chs=8, stem_type="fixed", norm_layer=norm)


def _mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes=CLASSES, img_size=64, patch_size=16, num_blocks=2, embed_dim=16)


def _volo() -> nn.Module:
    from timm.models.volo import VOLO

    return VOLO(
        layers=(1, 1, 1, 1),
        img_size=64,
        num_classes=CLASSES,
        patch_size=8,
        stem_hidden_dim=8,
        embed_dims=[8, 16, 16, 16],
        num_heads=[2, 2, 2, 2],
    )


def _efficientnetv2() -> nn.Module:
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    stages = [["cn_r1_k3_s1_e1_c8_skip"], ["er_r2_k3_s2_e4_c8"], ["ir_r2_k3_s2_e4_c16_se0.25"]]
    return EfficientNet(
        decode_arch_def(stages),
        num_classes=CLASSES,
        num_features=32,
        stem_size=8,
        act_layer=nn.SiLU,
        drop_path_rate=0.1,
    )


def _mobilenetv4() -> nn.Module:
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.mobilenetv3 import MobileNetV3

    stages = [
        ["cn_r1_k3_s2_e1_c8"],
        ["uir_r1_a5_k5_s2_e3_c16", "uir_r2_a0_k3_s1_e2_c16", "uir_r1_a3_k0_s1_e4_c16"],
        ["mqa_r1_k3_h2_s1_v2_d8_c16", "mha_r1_k3_h2_s1_d8_c16"],
        ["cn_r1_k1_s1_c24"],
    ]
    return MobileNetV3(
        decode_arch_def(stages),
        num_classes=CLASSES,
        stem_size=8,
        num_features=32,
        head_bias=False,
        head_norm=True,
        act_layer=nn.ReLU,
        layer_scale_init_value=0.5,
    )


def _nfnet() -> nn.Module:
    from timm.models.nfnet import NormFreeNet, model_cfgs

    config = model_cfgs["dm_nfnet_f0"]
    small = {"depths": (1, 2), "channels": (16, 32), "stem_chs": 16, "group_size": 4, "num_features": 48}
    return NormFreeNet(config, num_classes=CLASSES, drop_path_rate=0.1, **small)


def _windows() -> nn.Module:
    options = {"img_size": 64, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    return _timm("swin_tiny_patch4_window7_224", **options)()


FAMILIES: dict[str, dict[str, Maker]] = {
    "torchvision": {
        "resnet": _maker(partial(_resnet, "BasicBlock"), 32),
        "resnext": _maker(partial(_resnet, "Bottleneck", groups=8, width_per_group=4), 32),
        "wide_resnet": _maker(_wide_resnet, 32),
        "densenet": _maker(_densenet),
        "mobilenet_v2": _maker(_mobilenet_v2, 32),
        "mobilenet_v3": _maker(_mobilenet_v3, 32),
        "efficientnet": _maker(_efficientnet, 32),
        "shufflenet_v2": _maker(_shufflenet),
        "squeezenet": _maker(_squeezenet),
        "googlenet": _maker(_googlenet, 32, fixed=True),
        "inception_v3": _maker(_inception, 80, fixed=True),
        "regnet_y": _maker(_regnet, 32),
        "mnasnet": _maker(_mnasnet),
        "vgg11_bn": _maker(_vgg),
        "convnext": _maker(_convnext),
        "swin": _maker(_swin, fixed=True),
        "swin_v2": _maker(partial(_swin, "SwinTransformerBlockV2", "PatchMergingV2"), fixed=True),
        "vit": _maker(_vit),
        "maxvit": _maker(_maxvit, fixed=True),
    },
    "timm": {
        "resnetv2": _maker(
            _timm("resnetv2_50", layers=[1, 1, 1, 1], channels=(16, 32, 32, 64), stem_chs=8),
        ),
        "resnetv2_bit": _maker(_resnetv2_standardised),
        "seresnet": _maker(_timm("seresnet18", layers=[1, 1, 1, 1], channels=(16, 16, 32, 32), stem_width=8)),
        "resnest": _maker(_timm("resnest14d", channels=(16, 16, 32, 32), stem_width=8)),
        "convnext": _maker(_timm("convnext_atto", depths=(1, 2, 1, 1), dims=(8, 16, 16, 24), drop_path_rate=0.1)),
        "efficientnetv2": _maker(_efficientnetv2),
        "mobilenetv4": _maker(_mobilenetv4),
        "nfnet": _maker(_nfnet, fixed=True),
        "mixer": _maker(_mixer),
        "deit": _maker(_timm("deit_tiny_patch16_224", img_size=64, embed_dim=12, depth=2)),
        "deit_distilled": _maker(_timm("deit_tiny_distilled_patch16_224", img_size=64, embed_dim=12, depth=2)),
        "beit": _maker(_timm("beit_base_patch16_224", img_size=64, embed_dim=16, num_heads=2, depth=2)),
        "swin": _maker(_windows, fixed=True),
        "cait": _maker(_timm("cait_xxs24_224", img_size=64, embed_dim=16, num_heads=2, depth=2)),
        "volo": _maker(_volo, fixed=True),
    },
}
