"""CemiFace, reproduced. `import cemiface` is light: each public name loads its module when first used."""
__version__ = "0.1.0"

_homes = {
    "paper.published": ("errata", "beside"),
    "world.worlds": ("draw_world", "draw_benchmark"),
    "data.records": ("open_encoded",),
    "data.pairs": ("open_pairs",),
    "data.alignment": ("align_face", "align_folder"),
    "data.faceset": ("FaceSet", "open_faces", "to_float", "to_uint8"),
    "recognition.backbones": ("IResNet", "backbone"),
    "recognition.margins": ("CosFace", "ArcFace", "AdaFace"),
    "recognition.training": ("RecogniserConfig", "train_recogniser", "embed", "plot_history", "RECIPES", "save_recogniser", "load_recogniser"),
    "recognition.checkpoints": ("import_recogniser", "load_checkpoint", "export_onnx"),
    "recognition.verification": ("verify", "evaluate"),
    "recognition.groups": ("class_centres", "similarity_groups", "group_table"),
    "generation.conditioning": ("Conditioner", "GeneratorConfig", "GENERATORS", "face_unet", "face_conditioner"),
    "generation.simmat": ("SimMatConfig", "simmat_loss"),
    "generation.training": ("train_generator",),
    "generation.pipeline": ("CemiFacePipeline",),
    "generation.shipped": ("shipped_pipeline",),
    "sets.inquiries": ("select_inquiries", "choose_inquiries"),
    "sets.layout": ("merge_set", "set_plan"),
    "sets.synthesis": ("generate_set", "draw_m_grid"),
    "sets.stored": ("open_set", "verify_set", "regenerate"),
    "audit.card": ("write_card",),
    "generation.dcface": ("DCFaceConditioner", "DCFaceConfig", "DCFacePipeline", "StyleBank", "style_bank", "train_dcface"),
}
_home_of = {name: f"{__name__}.{module}" for module, names in _homes.items() for name in names}
# diffusers looks here for the base class that tells it how to load a component recorded as ["cemiface", "Conditioner"].
_home_of["ModelMixin"] = "diffusers"
__all__ = sorted(set(_home_of) - {"ModelMixin"})


def __getattr__(name):
    if name not in _home_of: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(_home_of[name]), name)


def __dir__(): return sorted({*globals(), *__all__})
