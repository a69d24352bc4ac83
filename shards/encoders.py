"""What encodes and decodes images: two versions of it may make different bytes of the same image."""

from importlib.metadata import version

from PIL import features


def encoders() -> dict[str, str]:
    """Returns the version of each library that the bytes of newly encoded images depend on."""
    return {
        "Pillow": version("pillow"),
        "libjpeg-turbo": str(features.version_feature("libjpeg_turbo")),
        "simplejpeg": version("simplejpeg"),
    }
