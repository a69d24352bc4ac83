import pytest

from maestri.evals.protocol import KnnReport
from maestri.evals.report import best_figures, figures, plot_run, summary, table

HELD = {
    "student": {"cls": {10: 70.0, 20: 71.0}, "mean": {10: 80.0, 20: 79.0}},
    "labelling_teacher": {"cls": {10: 85.0, 20: 60.0}, "mean": {10: 60.0, 20: 60.0}},
    "raw_pixels": {"raw": {10: 99.0, 20: 99.5}},
}
TEST = {
    "student": {"cls": {10: 90.0, 20: 91.0}, "mean": {10: 50.0, 20: 95.0}},
    "labelling_teacher": {"cls": {10: 55.0, 20: 66.0}, "mean": {10: 60.0, 20: 60.0}},
    "raw_pixels": {"raw": {10: 98.0, 20: 97.0}},
}


def test_choice__is_made_on_held_out_images_and_read_off_the_test_images():
    report = KnnReport(holdout=HELD, test=TEST)
    assert report.choice("student") == ("mean", 10)
    assert report.chosen("student") == 50.0
    assert report.best(("student", "labelling_teacher")) == "labelling_teacher"


def test_choice__falls_back_to_test_images_without_holdout():
    assert KnnReport(test=TEST).choice("student") == ("mean", 20)


def test_summary__names_choices_and_everything_measured():
    result = summary(KnnReport(holdout=HELD, test=TEST))
    assert result["best_model"] == "labelling_teacher"
    assert result["top1"]["student"] == {"pooling": "mean", "k": 10, "top1": 50.0}
    assert result["all"]["test"]["raw_pixels"]["raw"] == {"10": 98.0, "20": 97.0}
    assert summary(KnnReport(holdout=HELD))["split"] == "holdout"


def test_figures__are_flat():
    assert figures(KnnReport(holdout=HELD))["knn/student/mean/10"] == 80.0


def test_table__has_a_row_for_each_model_pooling_and_split():
    assert table(KnnReport(holdout=HELD, test=TEST)).row_count == 3 + 2 + 2 * 5


@pytest.mark.parametrize("with_rows", [True, False])
def test_plot_run__writes_a_picture(tmp_path, with_rows):
    rows = []
    if with_rows:
        rows = [{"kind": "train", "step": s, "loss": 5.0 / s, "loss_class": 1.0} for s in (1, 2, 3)]
        rows += [{"kind": "evaluation", "step": s, "knn/student/mean/20": 10.0 * s} for s in (0, 3)]
        rows[-1]["knn/raw_pixels/raw/20"] = 84.0
    plot_run(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_best_figures__one_for_each_model():
    row = {"step": 3, "knn/student/cls/10": 1.0, "knn/student/mean/10": 2.0, "knn/raw_pixels/raw/10": 9.0}
    assert best_figures(row) == {"student": "knn/student/mean/10", "raw_pixels": "knn/raw_pixels/raw/10"}
