"""`saccade detect` without the command line: loading, detections and their queries, files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

Image = pytest.importorskip("PIL.Image")
transformers = pytest.importorskip("transformers")

from vision_helpers import (  # noqa: E402
    FakeDetector,
    gradient_image,
    random_rt_detr,
    save_random_detector,
    save_random_rt_detr,
)

import saccade  # noqa: E402
from saccade.vision.batch import detect_images  # noqa: E402
from saccade.vision.detector import Detector, ModelError, find_queries  # noqa: E402
from saccade.vision.drawing import draw_detections  # noqa: E402
from saccade.vision.images import ImageError, open_image  # noqa: E402
from saccade.vision.report import plan_outputs  # noqa: E402
from saccade.vision.sampling_record import Recorder, find_decoder_operators  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {
        "deformable_detr": save_random_detector(base / "deformable_detr"),
        "rt_detr": save_random_rt_detr(base / "rt_detr"),
    }


@pytest.fixture(scope="module", params=["deformable_detr", "rt_detr"])
def detector(request, folders) -> Detector:
    return Detector.load(str(folders[request.param]))


@pytest.fixture(scope="module")
def deformable_detr(folders) -> Detector:
    return Detector.load(str(folders["deformable_detr"]))


IMAGES = [gradient_image(96, 50), gradient_image(40, 90)]


def threshold_for(detector: Detector) -> float:
    return 0.9 if "Deformable" in type(detector.model).__name__ else 0.3


@pytest.mark.slow
def test_attention_runs_on_saccade_and_agrees_with_transformers(detector) -> None:
    assert detector.operators
    with_saccade = detector.detect(IMAGES, 0.0)
    saccade.unpatch(detector.model)
    try:
        without = detector.detect(IMAGES, 0.0)
    finally:
        saccade.patch(detector.model)
    for ours, theirs in zip(with_saccade, without, strict=True):
        assert len(ours.detections) == len(theirs.detections) > 0
        for mine, other in zip(ours.detections[:5], theirs.detections[:5], strict=True):
            assert mine.score == pytest.approx(other.score, abs=1e-4)
            assert mine.box == pytest.approx(other.box, abs=0.02)


@pytest.mark.slow
def test_detections_are_those_of_the_post_processing(detector) -> None:
    threshold = threshold_for(detector)
    results = detector.detect(IMAGES, threshold)
    inputs = detector.processor(images=IMAGES, return_tensors="pt")
    with torch.inference_mode():
        outputs = detector.model(**inputs)
    expected = detector.processor.post_process_object_detection(
        outputs, threshold=threshold, target_sizes=[(p.height, p.width) for p in IMAGES]
    )
    for result, objects in zip(results, expected, strict=True):
        assert 0 < len(result.detections) == len(objects["scores"])
        assert [d.score for d in result.detections] == pytest.approx(objects["scores"].tolist())
        assert [d.label_id for d in result.detections] == objects["labels"].tolist()
        assert all(d.score > threshold for d in result.detections)


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.9])
def test_the_query_of_a_detection_predicted_its_box(detector, threshold) -> None:
    """The box and the score of a detection are those that its query predicted for its class."""
    inputs = detector.processor(images=IMAGES, return_tensors="pt")
    with torch.inference_mode():
        outputs = detector.model(**inputs)
    results = detector.detect(IMAGES, threshold)
    for index, (result, image) in enumerate(zip(results, IMAGES, strict=True)):
        for detection in result.detections:
            logits = outputs.logits[index, detection.query]
            assert float(logits[detection.label_id].sigmoid()) == pytest.approx(
                detection.score, abs=1e-5
            )
            x, y, w, h = outputs.pred_boxes[index, detection.query].tolist()
            box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
            sides = (image.width, image.height) * 2
            scaled = [side * length for side, length in zip(box, sides, strict=True)]
            assert detection.box == pytest.approx(scaled, abs=1e-3)


@pytest.mark.slow
def test_a_post_processing_that_changes_boxes_is_noticed(deformable_detr) -> None:
    class Clipping:
        def post_process_object_detection(self, outputs, threshold, target_sizes):
            return [{"boxes": outputs.pred_boxes[0].clamp(0, 1) * 0.5 + 0.1}]

    inputs = deformable_detr.processor(images=IMAGES[:1], return_tensors="pt")
    with torch.inference_mode():
        outputs = deformable_detr.model(**inputs)
    with pytest.raises(RuntimeError, match="changes boxes"):
        find_queries(Clipping(), outputs, 0.5)


@pytest.mark.slow
def test_the_reference_point_of_the_last_layer_is_the_box_before_it(deformable_detr) -> None:
    """With box refinement, a layer starts from the box of the previous layer: an independent path.

    The model keeps these boxes as parts of the image without padding; the recorded ones are
    parts of the padded tensor, by way of the valid ratios.
    """
    for images, tolerance in ((IMAGES[:1], 1e-3), (IMAGES, 8)):
        inputs = deformable_detr.processor(images=images, return_tensors="pt")
        with torch.inference_mode():
            outputs = deformable_detr.model(**inputs)
        before = outputs.intermediate_reference_points[:, -2, :, :2]
        results = deformable_detr.detect(images, 0.0)
        for index, (result, image) in enumerate(zip(results, images, strict=True)):
            for detection in result.detections:
                x, y = before[index, detection.query].tolist()
                expected = (x * image.width, y * image.height)
                # In a padded batch the valid ratio is rounded up to a whole cell, of 8 pixels here.
                assert detection.look.reference == pytest.approx(expected, abs=tolerance)


@pytest.mark.slow
def test_the_looks_are_those_of_the_chosen_layer(deformable_detr) -> None:
    first = deformable_detr.detect(IMAGES[:1], 0.0, layer=1)[0]
    last = deformable_detr.detect(IMAGES[:1], 0.0)[0]
    assert (first.layer, first.num_layers) == (1, 2)
    assert (last.layer, last.num_layers) == (2, 2)
    look, other = first.detections[0].look, last.detections[0].look
    assert look.positions.shape == (4, 16, 2)
    assert not torch.equal(look.positions, other.positions)
    torch.testing.assert_close(look.weights.sum(1), torch.ones(4))
    for layer in (0, 3):
        with pytest.raises(ValueError, match=f"layer: expected 1 to 2.*got {layer}"):
            deformable_detr.detect(IMAGES[:1], layer=layer)


def test_no_hook_stays_on_the_model(deformable_detr) -> None:
    deformable_detr.detect(IMAGES[:1])
    assert not any(module._forward_pre_hooks for module in deformable_detr.model.modules())
    with pytest.raises(RuntimeError, match="has not run"):
        Recorder(deformable_detr.model, deformable_detr.operators).recording()


def test_decoder_operators_are_sorted_by_number() -> None:
    names = [f"model.decoder.layers.{index}.encoder_attn.attn" for index in (10, 2, 0)]
    assert find_decoder_operators(["model.encoder.layers.1.self_attn.attn", *names]) == names[::-1]


# --- loading ----------------------------------------------------------------------------------


def test_a_model_without_deformable_attention_is_named(tmp_path) -> None:
    config = transformers.YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        num_detection_tokens=5,
    )
    transformers.YolosForObjectDetection(config).save_pretrained(tmp_path)
    transformers.YolosImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="YolosForObjectDetection, which has no deformable"):
        Detector.load(str(tmp_path))


@pytest.mark.slow
def test_a_checkpoint_that_lacks_weights_is_refused(folders, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folders["deformable_detr"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.decoder.layers.1.fc1.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights.*fc1\.weight"):
        Detector.load(str(tmp_path))


def test_a_folder_without_a_model_is_named(tmp_path) -> None:
    with pytest.raises(ModelError, match="cannot load"):
        Detector.load(str(tmp_path))
    with pytest.raises(ModelError, match="neither a folder nor the id"):
        Detector.load(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match="neither a folder nor the id"):
        Detector.load("nothing")


def test_a_file_is_not_an_id_of_the_hub(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "image.png").touch()
    (tmp_path / "folder" / "link").symlink_to("nothing")
    for source in ("folder/image.png", "folder/link"):
        with pytest.raises(ModelError, match="neither a folder nor the id"):
            Detector.load(source)


def test_a_decoder_that_computes_its_points_inside_is_refused() -> None:
    from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection

    config = random_rt_detr().config.to_dict()
    config.pop("model_type")
    detector = Detector("v2", RTDetrV2ForObjectDetection(RTDetrV2Config(**config)), None)
    reason = "computes the sampling points of its decoder inside RTDetrV2MultiscaleDeformableAtt"
    with pytest.raises(ModelError, match=rf"where v2 looks: RTDetrV2ForObjectDetection {reason}"):
        detector.check_recording()


def test_labels_of_several_lines_are_drawn_as_one() -> None:
    image = gradient_image(64, 64)
    result = FakeDetector().detect([image])[0].detections[0]
    split = [
        dataclasses.replace(result, label=label) for label in ("traffic\nlight", "traffic light")
    ]
    first, second = (draw_detections(image, [detection]).tobytes() for detection in split)
    assert first == second


def test_a_missing_default_model_is_explained(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("saccade.doctor.DEFAULT_MODEL", tmp_path)
    with pytest.raises(ModelError, match=r"no default model .*config\.json.*--model"):
        Detector.load()


def test_the_default_model_is_loaded_without_the_network(monkeypatch, folders) -> None:
    monkeypatch.setattr("saccade.doctor.DEFAULT_MODEL", folders["deformable_detr"])
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    assert Detector.load().name == "saccade's digits"


# --- images ---------------------------------------------------------------------------------


def test_every_kind_of_image_is_read(tmp_path) -> None:
    rgb = gradient_image(40, 30)
    grey = rgb.convert("L")
    wide = grey.point(lambda level: level * 257, "I").convert("I;16")
    for name, image in {
        "rgb.jpg": rgb,
        "grey.png": grey,
        "palette.gif": rgb.convert("P"),
        "one.png": grey.convert("1"),
        "cmyk.tif": rgb.convert("CMYK"),
        "alpha.png": rgb.convert("RGBA"),
        "wide.png": wide,
        "float.tif": grey.convert("F"),
        "web.webp": rgb,
    }.items():
        image.save(tmp_path / name)
        read = open_image(tmp_path / name)
        assert (read.mode, read.size) == ("RGB", (40, 30)), name
    # 16 bits are scaled, not clipped
    difference = [
        abs(a - b)
        for a, b in zip(
            open_image(tmp_path / "wide.png").convert("L").tobytes(),
            grey.tobytes(),
            strict=True,
        )
    ]
    assert max(difference) <= 1


def test_transparent_parts_are_white(tmp_path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_respected(tmp_path) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes top
    image.save(tmp_path / "turned.png", exif=exif)
    upright = open_image(tmp_path / "turned.png")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (255, 255, 255)
    assert upright.getpixel((10, 35)) == (0, 0, 0)


def test_images_that_cannot_be_read_say_why(tmp_path) -> None:
    gradient_image(40, 30).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    for name, reason in {
        "cut.png": "is broken",
        "text.png": "not an image",
        "empty.png": "not an image",
        "nothing.png": "does not exist",
        ".": "is a folder",
    }.items():
        with pytest.raises(ImageError, match=reason):
            open_image(tmp_path / name)


# --- files ------------------------------------------------------------------------------------


def test_equal_stems_get_different_files(tmp_path) -> None:
    images = [Path("a/1.png"), Path("b/1.png"), Path("b/1.jpg"), Path("1-2.png"), Path("C/A.png")]
    images.append(Path("d/a.png"))
    names = [files.json.stem for files in plan_outputs(images, tmp_path)]
    assert names == ["1", "1-2", "1-3", "1-2-2", "A", "a-2"]


def test_no_input_is_overwritten(tmp_path) -> None:
    images = [tmp_path / "x.png", tmp_path / "x_looked.png"]
    planned = plan_outputs(images, tmp_path)
    written = {file for files in planned for file in files}
    assert len(written) == 6
    assert not written & set(images)


@pytest.mark.slow
def test_an_image_that_fails_does_not_stop_the_rest(deformable_detr, tmp_path) -> None:
    gradient_image(96, 50).save(tmp_path / "good.png")
    Image.new("RGB", (1, 4000)).save(tmp_path / "thin.png")
    (tmp_path / "bad.png").write_text("no image")
    out = tmp_path / "out"
    out.mkdir()
    names = ["bad.png", "thin.png", "good.png"]
    done = list(detect_images(deformable_detr, [tmp_path / name for name in names], out, 0.9))
    assert "not an image" in str(done[0].problem)
    assert done[1].problem is not None
    assert done[2].problem is None
    assert done[2].files is not None
    assert sorted(out.iterdir()) == sorted(done[2].files)


@pytest.mark.slow
def test_the_json_holds_the_detections(deformable_detr, tmp_path) -> None:
    gradient_image(96, 50).save(tmp_path / "good.png")
    (done,) = detect_images(deformable_detr, [tmp_path / "good.png"], tmp_path, 0.9)
    assert done.files is not None
    report = json.loads(done.files.json.read_text())
    assert report["image"] == str(tmp_path / "good.png")
    assert (report["width"], report["height"], report["threshold"]) == (96, 50, 0.9)
    assert report["backend"] == saccade.which_backend().name
    detections = deformable_detr.detect([open_image(tmp_path / "good.png")], 0.9)[0].detections
    assert 0 < len(report["detections"]) == len(detections)
    for entry, expected in zip(report["detections"], detections, strict=True):
        assert entry["label"] == f"digit {entry['label_id']}" == expected.label
        assert entry["box"] == pytest.approx(expected.box, abs=0.01)
        assert entry["query"] == expected.query
