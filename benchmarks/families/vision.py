"""torchvision's and timm's models with random weights; both are optional."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.families import Example, Maker


def _image(size: int = 64) -> dict[str, Any]:
    return {
        "args": (torch.randn(2, 3, size, size).double(),),
        "other_args": (torch.randn(3, 3, size, size).double(),),
    }


def _torchvision(name: str, size: int = 64, **options: Any) -> Maker:
    def make() -> Example:
        import torchvision  # type: ignore[import-not-found,unused-ignore]

        model = torchvision.models.get_model(name, weights=None, num_classes=5, **options)
        return Example(model, {}, {}, **_image(size))

    return make


def _timm(name: str, size: int = 64, **options: Any) -> Maker:
    def make() -> Example:
        import timm  # type: ignore[import-not-found,unused-ignore]

        model = timm.create_model(name, pretrained=False, num_classes=5, **options)
        return Example(model, {}, {}, **_image(size))

    return make


FAMILIES: dict[str, dict[str, Maker]] = {
    "torchvision": {
        **{
            n: _torchvision(n)
            for n in (
                "resnet18",
                "resnext50_32x4d",
                "wide_resnet50_2",
                "densenet121",
                "mobilenet_v2",
                "mobilenet_v3_small",
                "efficientnet_b0",
                "shufflenet_v2_x0_5",
                "squeezenet1_1",
                "regnet_y_400mf",
                "mnasnet0_5",
                "vgg11_bn",
                "convnext_tiny",
                "swin_t",
            )
        },
        "googlenet": _torchvision("googlenet", aux_logits=False, init_weights=True),
        "inception_v3": _torchvision("inception_v3", 96, aux_logits=False, init_weights=True),
        "vit_b_16": _torchvision("vit_b_16", 64, image_size=64),
        "maxvit_t": _torchvision("maxvit_t", 64, input_size=(64, 64)),
    },
    "timm": {
        n: _timm(n, size, **options)
        for n, size, options in (
            ("resnetv2_50", 64, {}),
            ("seresnet18", 64, {}),
            ("resnest14d", 64, {}),
            ("convnext_atto", 64, {}),
            ("efficientnetv2_rw_t", 64, {}),
            ("mobilenetv4_conv_small", 64, {}),
            ("dm_nfnet_f0", 64, {}),
            ("mixer_s32_224", 224, {}),
            ("deit_tiny_patch16_224", 224, {}),
            ("beit_base_patch16_224", 224, {"depth": 2}),
            ("swin_tiny_patch4_window7_224", 224, {}),
            ("cait_xxs24_224", 224, {"depth": 2}),
            ("volo_d1_224", 224, {}),
        )
    },
}
