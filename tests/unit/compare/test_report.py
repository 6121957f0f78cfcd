import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from quantkit.compare.charts import Mark, curve_chart, interval_chart, swarm_chart
from quantkit.compare.difference import FULL_SCALE, difference_map, paint
from quantkit.compare.embed import embed, embed_frames
from quantkit.compare.gallery import PLAYED_FRAMES
from quantkit.compare.metrics import CURVES
from quantkit.compare.numbers import milliseconds, seconds, short, size, times
from quantkit.compare.report import render
from quantkit.compare.request import Request
from quantkit.compare.result import Timing
from quantkit.compare.run import compare
from quantkit.compare.summary import spread, worst_first
from quantkit.compare.tables import tiles
from quantkit.errors import CheckpointError
from quantkit.recipe.schema import Sampling, Threshold

STEPS = CURVES["latent_rel_l2"]


class Page(HTMLParser):
    """Collects what a page refers to and its text, and checks that its tags are balanced."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.images, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.references += [attributes[key] for key in ("src", "href", "srcset", "poster") if key in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def compared(model, tmp_path):
    def call(prompts=("a disc", "another disc", "<b>bold & bad</b>"), height=32, **behaviour):
        request = Request(
            model("reference"),
            model("candidate", **({"error": 0.1} | behaviour)),
            prompts,
            (0, 1),
            sampling=(Sampling(height=height, width=height, num_inference_steps=4),),
            thresholds={"psnr": Threshold(min=20), "lpips": Threshold(max=0.1)},
            thresholds_source="mine.yaml: compare.thresholds",
            device="cpu",
            command=("quantkit", "compare", "--prompt", "two words"),
        )
        return compare(request, tmp_path / "out", overwrite=True), tmp_path / "out"

    return call


def test_the_report_is_well_formed_and_refers_to_nothing_outside(compared):
    result, folder = compared()
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert all(reference.startswith(("data:", "images/")) for reference in page.references)
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.images)
    assert not re.search(r"https?://|url\(|@import|<link", text)
    assert len(page.images) == 3 * len(result.items)
    assert all((folder / name).is_file() for name in page.references if name.startswith("images/"))


def test_the_report_shows_verdict_thresholds_prompts_and_command(compared):
    result, folder = compared()
    text = " ".join(Page((folder / "report.html").read_text()).text)
    assert text.index(result.verdict.outcome) < text.index("Thresholds") < text.index("Images, worst first")
    for expected in (
        "mine.yaml: compare.thresholds", "<b>bold & bad</b>", "quantkit compare --prompt 'two words'",
        "AlexNet weights are not at", "W4A16, group 128, symmetric", "\u2265 20",
    ):  # fmt: skip
        assert expected in text, expected


@pytest.mark.parametrize(("slowest", "doubted"), [(20.0, False), (21.0, True)])
def test_a_ratio_of_times_that_vary_widely_is_doubted(compared, slowest, doubted):
    result, _ = compared()
    times = Timing(median=12.0, p10=10.0, p90=slowest, count=9)
    steady = Timing(median=11.0, p10=10.0, p90=12.0, count=9)
    result = result.model_copy(
        update={
            "reference": result.reference.model_copy(update={"step_ms": times}),
            "candidate": result.candidate.model_copy(update={"step_ms": steady}),
        }
    )
    assert [tile["note"] for tile in tiles(result) if tile["label"].startswith("Time")] == [
        "11 ms instead of 12 ms" + ", but the times vary widely" * doubted
    ]


def test_the_worst_prompt_is_seen_first(compared):
    result, folder = compared()
    means = {
        prompt: np.mean([item.metrics["flip"] for item in result.items if item.prompt == prompt])
        for prompt in range(3)
    }
    shown = [
        int(number)
        for number in re.findall(r'<span class="index">(\d)</span>', (folder / "report.html").read_text())
    ]
    assert shown == sorted(means, key=means.__getitem__, reverse=True)


def test_images_beyond_the_budget_are_left_out_best_first_and_counted(compared):
    result, folder = compared()
    text = render(result, folder, budget_bytes=0)
    assert len(Page(text).images) == 6  # the worst prompt with both seeds is always there
    assert "2 prompts that came out better are left out" in text
    worst = worst_first(result.items, "flip")[0][0].prompt
    assert re.findall(r'<span class="index">(\d)</span>', text) == [str(worst)]


def test_a_candidate_that_cannot_be_scored_still_gets_a_report(compared):
    _, folder = compared(bad_from_step=1)
    text = (folder / "report.html").read_text()
    Page(text)
    assert "latents are not finite from step 2" in text
    assert "No image of the candidate could be scored" in text


def test_equal_models_get_a_sentence_in_place_of_empty_curves(compared):
    _, folder = compared(error=0.0)
    assert (folder / "report.html").read_text().count("Exactly 0 at every denoising step") == 2


def test_a_missing_image_is_one_clear_error(compared):
    result, folder = compared()
    (folder / result.items[0].output.candidate).unlink()
    with pytest.raises(CheckpointError, match=r"candidate\.png: cannot be read as an image"):
        render(result, folder)


def test_small_images_are_embedded_as_they_are_and_large_ones_as_thumbnails(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    Image.fromarray(noise[:64, :64]).save(tmp_path / "small.png")
    small, large = embed(tmp_path / "small.png"), embed(tmp_path / "large.png")
    assert small.pixelated
    assert small.uri.startswith("data:image/png")
    assert not large.pixelated
    assert large.uri.startswith("data:image/webp")
    assert len(large.uri) < 300_000  # noise is the worst that an image can be


def test_a_small_picture_of_another_format_is_embedded_as_one_that_browsers_know(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "start.bmp")
    embedded = embed(tmp_path / "start.bmp")
    assert embedded.uri.startswith("data:image/webp")
    assert np.array_equal(np.asarray(decoded(embedded.uri)), pixels)


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_small_frames_lose_nothing_in_their_sheet_and_large_ones_are_scaled_to_a_bound():
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    small = embed_frames(frames)
    assert small.pixelated
    assert np.array_equal(np.asarray(decoded(small.uri)), frames.reshape(120, 60, 3))
    large = embed_frames(np.repeat(frames, 16, axis=1).repeat(16, axis=2))
    assert not large.pixelated
    assert decoded(large.uri).size == (320, 3 * 213)


def test_the_longest_sheet_stays_within_what_webp_can_hold():
    tall = embed_frames(np.zeros((PLAYED_FRAMES, 640, 16, 3), np.uint8))
    assert decoded(tall.uri).size == (8, PLAYED_FRAMES * 320)


def test_the_difference_picture_is_dark_where_nothing_differs_and_light_where_much_does():
    image = np.zeros((32, 32, 3), np.uint8)
    other = image.copy()
    other[8:24, 8:24] = 255
    painted = paint(difference_map(image, other), "FLIP").astype(int).sum(axis=2)
    assert painted[0, 0] < 20
    assert painted[16, 16] > 600


def test_colours_get_lighter_all_the_way_up():
    luminance = paint(np.linspace(0, FULL_SCALE["FLIP"], 64)[None], "FLIP")[0] @ np.array([0.2126, 0.7152, 0.0722])
    assert np.all(np.diff(luminance) > 0)


@pytest.mark.parametrize("values", [[1e-9, 3e-4, 0.7], [0.02, 0.021, 0.0211], [5.0], [0.0, 0.0, 0.1], [2, 2]])
def test_a_curve_stays_within_its_frame(values):
    chart = curve_chart(STEPS, spread([values]), [Mark(values, "l")])
    width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', chart).groups())
    points = [tuple(map(float, point)) for point in re.findall(r"(?<=[ML])(-?[\d.]+),(-?[\d.]+)", chart)]
    assert points
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert 2 <= chart.count('class="tick end"') <= 8


def test_a_linear_curve_has_equal_ticks_and_starts_at_its_first_number():
    curve = dataclasses.replace(CURVES["frame_psnr"], first=2)
    chart = curve_chart(curve, spread([[30.0, 20.0, 40.0]]), [Mark([30.0, 20.0, 40.0], "l")])
    ticks = [float(text) for text in re.findall(r'class="tick end"[^>]*>([\d.-]+)<', chart)]
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])
    assert re.findall(r'class="tick middle"[^>]*>(\d+)<', chart) == ["2", "3", "4"]
    assert "frame 3: median 20, 10 to 90 %: 20 to 20, worst 20, of 1" in chart


def test_answers_of_different_lengths_are_described_where_they_reach():
    found = spread([[1.0, 2.0, 3.0], [3.0]])
    assert found.median == (2, 2, 3)
    assert found.count == (2, 1, 1)
    assert spread([]) is None


def test_a_larger_value_is_drawn_higher():
    chart = curve_chart(STEPS, spread([[0.001, 0.01, 0.1]]), [Mark([0.001, 0.01, 0.1], "l")])
    heights = [float(y) for y in re.findall(r"[\d.]+,([\d.]+)", re.search(r'class="median" d="([^"]+)"', chart)[1])]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)  # equal factors, equal rises


def test_the_noise_floor_is_drawn_where_there_is_one():
    lines = [Mark([0.1, 0.2], "l")]
    assert "floor" in curve_chart(STEPS, spread([[0.1, 0.2]]), lines, (0.01, 0.02))
    assert "floor" not in curve_chart(STEPS, spread([[0.1, 0.2]]), lines, (0.0, 0.0))


def test_many_images_do_not_make_the_page_large():
    rows = np.random.default_rng(0).uniform(0.01, 1, (5000, 50)).tolist()
    chart = curve_chart(STEPS, spread(rows), [Mark(row, "prompt") for row in rows])
    assert len(chart) < 400_000


def test_dots_of_a_swarm_do_not_cover_each_other_while_there_is_room():
    dots = [Mark([value], "p") for value in np.random.default_rng(0).uniform(0, 1, 40)]
    chart = swarm_chart("t", dots, 0.5, Threshold(max=0.8), (0, 1))
    centres = np.array([tuple(map(float, c)) for c in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)])
    distances = np.linalg.norm(centres[:, None] - centres[None], axis=2) + 100 * np.eye(len(centres))
    assert len(centres) == 40
    assert distances.min() > 8
    assert chart.count('class="bad"') == 1


def test_a_swarm_of_equal_values_is_drawn():
    chart = swarm_chart("t", [Mark([100.0], "p")] * 3, 100.0, None, (0, 100))
    assert chart.count('class="dot"') == 3
    assert "nan" not in chart


def test_an_interval_chart_shades_the_bad_side_of_each_bound():
    assert interval_chart("t", 1.0, 0.9, 1.1, Threshold(min=0.95)).count('class="bad"') == 1
    assert interval_chart("t", 1.0, 1.0, 1.0, Threshold(min=0.9, max=1.2)).count('class="bad"') == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (short(0), "0"), (short(0.04123), "0.0412"), (short(31.4159), "31.42"), (short(1.234e-7), "1.23e-07"),
        (short(0.99987), "0.99987"), (short(0.90321), "0.9032"), (short(0.99), "0.99"), (short(1.0), "1"),
        (size(512), "512 B"), (size(7 * 2**30), "7 GiB"),
        (size(22_000_000), "21 MiB"), (milliseconds(101.2), "101 ms"), (milliseconds(20_000), "20 s"),
        (milliseconds(3010), "3010 ms"),
        (seconds(0.25), "250 ms"), (times(0.273), "0.27\u00d7"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(text, expected):
    assert text == expected
