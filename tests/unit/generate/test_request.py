"""Requests that cannot be carried out are refused before a weight is read, with the option that is at fault."""

import shutil

import pytest

import quantkit.demo
from quantkit.errors import MissingExtraError, OutputError, RecipeError, UnsupportedModelError
from quantkit.families.registry import family_names, get_family
from quantkit.generate import Request, prepare
from quantkit.recipe.prompts import Prompt
from quantkit.recipe.schema import Sampling
from quantkit_runtime.errors import BackendUnavailableError


@pytest.fixture
def ask(tmp_path):
    """Prepare a request to the embedded model that would write ``out.png``."""

    def prepared(text="a red circle", *, image=None, audio=None, **changes):
        prompt = Prompt(text, image=image, audio=audio)
        return prepare(Request(quantkit.demo.path(), prompt, **{"output": tmp_path / "out.png", **changes}))

    return prepared


REFUSED = {
    "empty prompt": ({"text": " "}, RecipeError, "--prompt: is empty"),
    "picture": ({"image": "x.png"}, RecipeError, "--image: flux draws from text alone"),
    "sound": ({"audio": "x.wav"}, RecipeError, "--audio: flux draws from text alone"),
    "another family's key": ({"sampling": (Sampling(num_frames=5),)}, RecipeError, "flux takes no num_frames"),
    "height": (
        {"sampling": (Sampling(height=63),)},
        RecipeError,
        r"^--height: is 63, but this flux model draws multiples of 8; use 56 or 64$",
    ),
    "width of the recipe": (
        {"sampling": (Sampling(width=4), Sampling(height=64))},
        RecipeError,
        r"^the recipe's width: is 4, but this flux model draws multiples of 8; use 8$",
    ),
    "more than any memory holds": (
        {"sampling": (Sampling(height=100_000, width=100_000),)},
        RecipeError,
        r"^--width, --height: 100000 x 100000 are 10000000000 pixels; more than 4194304 are drawn with --any-size",
    ),
    "a device that records nothing": (
        {"cuda_graphs": True, "device": "cpu"},
        BackendUnavailableError,
        "CUDA graphs need a CUDA device, not cpu; leave them out",
    ),
    "device": ({"device": "cuda:9"}, RecipeError, "device: 'cuda:9' is not available here"),
    "dtype": ({"dtype": "int8"}, RecipeError, "dtype: 'int8' is unknown"),
    "compute": (
        {"compute": "fp4"},
        BackendUnavailableError,
        r"compute 'fp4' does not exist; use 'auto' or one of \('16bit', 'fp8'\)",
    ),
    "compute of packed layers alone": (
        {"compute": "fp8"},
        BackendUnavailableError,
        "compute 'fp8': only for packed layers, and .*/pipeline is not quantized; leave it out",
    ),
    "backend": ({"backend": "marlin"}, BackendUnavailableError, "backend 'marlin' does not exist"),
    "backend of packed layers alone": (
        {"backend": "reference"},
        BackendUnavailableError,
        "backend 'reference': only for packed layers, and .*/pipeline is not quantized; leave it out",
    ),
    "three branches": ({"cfg_parallel": 3}, RecipeError, "--cfg-parallel: must be 1 or 2"),
    "no rank": ({"tensor_parallel": 0}, RecipeError, "--tensor-parallel: must be at least 1"),
    "no replica": ({"replicas": 0}, RecipeError, "--replicas: must be at least 1"),
    "replicas of several ranks": (
        {"replicas": 2, "tensor_parallel": 2},
        RecipeError,
        "--replicas: each is one rank; leave out",
    ),
    "no guidance": (
        {"cfg_parallel": 2},
        UnsupportedModelError,
        "--cfg-parallel: guidance is off, .*flux is guided with --true-cfg-scale above 1",
    ),
    "no output": ({"output": None}, OutputError, "--output: give a file to write, .png or"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_cannot_be_right_is_refused(ask, name):
    changes, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        ask(**changes)


@pytest.mark.parametrize("suffix", [".mp4", ".txt", "", ".bmp"])
def test_a_suffix_of_another_task_is_refused(ask, tmp_path, suffix):
    with pytest.raises(OutputError, match=r"writes .png or .jpg"):
        ask(output=tmp_path / f"out{suffix}")


def test_an_existing_output_is_left_alone_unless_asked(ask, tmp_path):
    (tmp_path / "out.png").write_text("mine")
    with pytest.raises(OutputError, match=r"out.png: exists; give another --output or --overwrite"):
        ask()
    assert ask(overwrite=True).ranks == 1
    assert (tmp_path / "out.png").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [tmp_path / "out.png"]


def test_a_folder_is_not_replaced_by_a_file(ask, tmp_path):
    (tmp_path / "out.png").mkdir()
    with pytest.raises(OutputError, match=r"out.png: is a folder"):
        ask(overwrite=True)


def test_a_folder_that_is_no_video_is_not_replaced(tiny_wan, tmp_path):
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "mine.txt").touch()
    with pytest.raises(OutputError, match=r"holds no frame0000.png, so it is not replaced"):
        prepare(Request(tiny_wan, Prompt("a"), output=tmp_path / "frames", overwrite=True))


def test_mp4_without_an_encoder_is_refused_with_the_line_that_installs_it(tiny_wan, tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.generate.media.find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"av .* is not installed: pip install 'quantkit\[video\]'"):
        prepare(Request(tiny_wan, Prompt("a"), output=tmp_path / "a.mp4"))


def test_a_size_beyond_the_servers_limit_is_drawn_where_that_is_said(ask):
    assert ask(sampling=(Sampling(height=4096, width=2048),), any_size=True).sampling.height == 4096


def test_a_number_of_frames_that_the_autoencoder_cannot_make_is_refused_with_its_neighbours(tiny_wan, tmp_path):
    def ask(**sizes):
        prepare(Request(tiny_wan, Prompt("a"), output=tmp_path / "a.gif", sampling=(Sampling(**sizes),)))

    with pytest.raises(RecipeError) as caught:
        ask(num_frames=48, height=488)
    assert caught.value.problems == (
        "--height: is 488, but this wan2.2-t2v model draws multiples of 16; use 480 or 496",
        "--num-frames: is 48, but this wan2.2-t2v model draws 1 more than multiples of 4; use 45 or 49",
    )
    with pytest.raises(RecipeError, match="--num-frames: is 100001; more than 257 are drawn with --any-size only"):
        ask(num_frames=100_001)
    ask(num_frames=49)


@pytest.fixture
def tiny_wan(tmp_path):
    """A folder that is a Wan2.2 T2V as far as its configuration goes."""
    from quantkit.families.published import ROOT

    return shutil.copytree(ROOT / "Wan-AI" / "Wan2.2-T2V-A14B-Diffusers", tmp_path / "model")


def test_a_seed_is_drawn_where_none_is_given(ask):
    first, second = ask().seed, ask().seed
    assert first != second
    assert ask(seed=7).seed == 7


def test_ranks_are_branches_times_shares(ask):
    guided = (Sampling(true_cfg_scale=2.0),)
    assert ask(cfg_parallel=2, tensor_parallel=3, sampling=guided).ranks == 6


@pytest.mark.parametrize("name", family_names())
def test_every_family_that_draws_tells_whether_it_is_guided(name):
    family = get_family(name)
    if family.task == "chat":
        assert not family.is_guided(family.sampling)
        return
    on, off = (family.sampling_for(Sampling(**{family.guidance: scale})) for scale in (2.0, 1.0))
    assert family.is_guided(on)
    assert not family.is_guided(off)


def test_of_the_ranks_of_torchrun_the_first_alone_looks_whether_the_output_can_be_written(
    ask, tmp_path, monkeypatch
):
    (tmp_path / "out.png").touch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    ask()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(OutputError, match="exists"):
        ask()
