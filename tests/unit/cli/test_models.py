"""From what a user types to a folder."""

import huggingface_hub
import pytest

from quantkit.cli.models import resolve_model


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose repository holds the given files; returns the patterns of each download."""

    def serve(*files):
        asked = []

        def download(_hub_id, allow_patterns=None, ignore_patterns=None, **_given):
            asked.append(ignore_patterns or allow_patterns)
            for name in files:
                if allow_patterns is None or name in allow_patterns:
                    (tmp_path / name).touch()
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return asked

    return serve


def test_a_single_model_is_downloaded_whole_but_for_its_pickles(hub, tmp_path):
    asked = hub("config.json", "model.safetensors", "spk_dict.pt")
    assert resolve_model("org/omni") == tmp_path
    assert asked == [["model_index.json", "config.json"], ["*.bin", "*.pth"]]
    assert (tmp_path / "spk_dict.pt").is_file()


def test_of_a_pipeline_diffusers_downloads_what_it_needs(hub, monkeypatch, tmp_path):
    import diffusers

    hub("model_index.json")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", lambda *_args, **_kwargs: str(tmp_path / "p"))
    assert resolve_model("org/flux") == tmp_path / "p"
