"""The sections of a report about rows: predictions, images and errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batch_inference.report.failure_examples import EXAMPLES_PER_GROUP, FailedRow, interleave
from batch_inference.report.prediction_stats import BINS, MAX_CLASSES, PredictionSample, PredictionStats
from batch_inference.report.svg import bar_chart
from batch_inference.telemetry.tracebacks import MAX_CHARACTERS, last_frame
from batch_inference.text import NO_NUMBER, file_name, format_number, format_percent, format_tick, safe_excerpt

if TYPE_CHECKING:
    from batch_inference.report.facts import ReportFacts

MAX_CLASS_ROWS = 30
_MAX_ERROR_ROWS = 50
_MAX_COLUMN_ROWS = 60


# --- predictions ---


def predictions_section(facts: ReportFacts) -> dict[str, Any]:
    """Return the values of the section on predictions: classes, confidences and columns."""
    stats = facts.stats
    sampled = ""
    if stats is not None and not stats.complete:
        sampled = (
            f"From {stats.rows:,} predictions in {stats.files_read:,} of {stats.files:,} files, chosen at random, because the time for "
            "reading was over. `batch-inference report` makes a report from all files."
        )
    return {
        "predictions": facts.tally.predictions,
        "sampled": sampled,
        "classes": _class_table(stats),
        "confidences": _confidence_chart(stats),
        "columns": _column_table(stats),
    }


def _class_table(stats: PredictionStats | None) -> dict[str, Any] | None:
    if stats is None or not stats.class_column or not stats.rows:
        return None
    if stats.too_many_classes:
        return None
    total = sum(stats.classes.values())
    # Classes of equal count are in order of their names, so that the same job gets the same report.
    ranked = sorted(stats.classes.items(), key=lambda item: (-item[1], item[0]))
    top, others = ranked[:MAX_CLASS_ROWS], ranked[MAX_CLASS_ROWS:]
    largest = top[0][1]
    number = len(ranked)
    prefix = "" if stats.class_column == "label" else "class "
    others_count = sum(count for _, count in others)
    return {
        "title": f"The {len(top)} most frequent classes" if others else "Classes",
        "sentence": f"{number:,} different value{'s' * (number != 1)} of {safe_excerpt(stats.class_column)} in {total:,} predictions.",
        "rows": [
            {
                "name": prefix + (safe_excerpt(name, 100) or "no label"),
                "count": f"{count:,}",
                "percent": format_percent(count, total),
                "width": round(100 * count / largest, 2),
            }
            for name, count in top
        ],
        "others": {
            "name": f"{len(others):,} others",
            "count": f"{others_count:,}",
            "percent": format_percent(others_count, total),
        }
        if others
        else None,
    }


def _confidence_chart(stats: PredictionStats | None) -> dict[str, Any] | None:
    if stats is None or stats.confidence_counts is None or not stats.confidence_counts.sum():
        return None
    counts = stats.confidence_counts
    total = int(counts.sum())
    numbers = stats.numbers["confidence"]
    below_half = int(counts[: BINS // 2].sum())
    sentence = (
        f"Mean {format_number(numbers.mean)}, from {format_number(numbers.minimum)} to {format_number(numbers.maximum)}; "
        f"{format_percent(below_half, total)} of the predictions are below 0.5."
    )
    if stats.confidences_out_of_range:
        sentence += f" {stats.confidences_out_of_range:,} are not between 0 and 1 and not drawn."
    if numbers.missing:
        sentence += f" {numbers.missing:,} are missing."
    svg = bar_chart(
        "confidence",
        "Predictions by confidence",
        sentence,
        [float(count) for count in counts],
        {round(BINS * part / 4): f"{part / 4:g}" for part in range(5)},
        text=format_tick,
    )
    return {"svg": svg, "sentence": f"Predictions by confidence. {sentence}"}


def _column_table(stats: PredictionStats | None) -> dict[str, Any] | None:
    if stats is None or not stats.columns:
        return None
    rows = []
    for column in stats.columns[:_MAX_COLUMN_ROWS]:
        numbers = stats.numbers.get(column.name)
        values = {"minimum": "", "mean": "", "maximum": "", "missing": ""}
        if numbers is not None:
            values = {
                "minimum": format_number(numbers.minimum) if numbers.count else NO_NUMBER,
                "mean": format_number(numbers.mean),
                "maximum": format_number(numbers.maximum) if numbers.count else NO_NUMBER,
                "missing": f"{numbers.missing:,}",
            }
        shape = column.shape or ("one value" if column.name in stats.numbers or "string" in column.type else "")
        name, type_name = safe_excerpt(column.name, 80), safe_excerpt(column.type, 120)
        rows.append({"name": name, "type": type_name, "shape": shape, **values})
    unlisted = len(stats.columns) - len(rows)
    sentence = "The columns that the predictor wrote, with the shape of one image's value."
    if stats.too_many_classes:
        sentence += f" {stats.class_column} has more than {MAX_CLASSES:,} different values, which are not counted."
    return {"rows": rows, "sentence": sentence + (f" {unlisted:,} more columns are not listed." if unlisted else "")}


# --- images ---


def images_section(facts: ReportFacts) -> dict[str, Any]:
    """Return the values of the section on images: galleries of the most and the least confident predictions."""
    stats = facts.stats
    galleries: list[tuple[str, str, list[PredictionSample]]] = []
    if stats is not None and facts.config.report.thumbnails:
        if stats.highest:
            # With few predictions, both galleries would have the same images.
            total = stats.numbers["confidence"].count
            half = min(len(stats.highest), -(-total // 2))
            galleries.append(("Most confident", "The highest confidences, highest first.", stats.highest[:half]))
            least = stats.lowest[: total - half]
            galleries.append(("Least confident", "The lowest confidences, lowest first.", least))
        elif stats.samples:
            sentence = "The predictions have no column confidence to sort by."
            galleries.append(("Some predictions", sentence, stats.samples))
    return {
        "galleries": [
            {"title": title, "sentence": sentence, "cards": [_prediction_card(facts, sample) for sample in samples]}
            for title, sentence, samples in galleries
            if samples
        ],
        "no_galleries": "" if facts.config.report.thumbnails else ", since report.thumbnails is 0",
    }


def _prediction_card(facts: ReportFacts, sample: PredictionSample) -> dict[str, str]:
    thumbnail = facts.thumbnails.get((sample.shard, sample.row))
    uri = thumbnail.uri if thumbnail else ""
    name = file_name(uri) or f"row {sample.row} of shard {sample.shard}"
    data = thumbnail.data if thumbnail else ""
    reason = safe_excerpt(thumbnail.reason if thumbnail else "the image was not read", 160)
    prediction = safe_excerpt(sample.text, 100)
    return {
        "data": data,
        "alt": f"{name}, predicted {prediction}" + ("" if data else f", no picture: {reason}"),
        "title": prediction,
        "percent": "" if sample.confidence is None else _format_confidence(sample.confidence),
        "message": "" if data else reason,
        "uri": safe_excerpt(uri, 400),
        "name": name,
    }


def _format_confidence(value: float) -> str:
    return format_percent(value, 1.0) if 0 <= value <= 1 else format_number(value)


# --- errors ---


def errors_section(facts: ReportFacts) -> dict[str, Any]:
    """Return the values of the section on errors: failed rows by stage and type, and a gallery of them."""
    groups, tally = facts.failure_groups, facts.tally
    rows = [
        {
            "stage": safe_excerpt(group.stage, 20),
            "type": safe_excerpt(group.error_type, 60),
            "count": f"{group.count:,}",
            "percent": format_percent(group.count, tally.errors),
            "examples": [
                {
                    "uri": safe_excerpt(failed.uri, 300) or "no URI",
                    "message": safe_excerpt(failed.message, 400),
                    "traceback": traceback,
                }
                for failed, traceback in _with_tracebacks(group.examples[:EXAMPLES_PER_GROUP])
            ],
        }
        for group in groups[:_MAX_ERROR_ROWS]
    ]
    unlisted = len(groups) - len(rows)
    share = format_percent(tally.errors, tally.rows)
    sentence = f"{tally.errors:,} of {tally.rows:,} rows failed ({share}); all of them are in errors/."
    sentence += f" {unlisted:,} more types are not listed." if unlisted > 0 else ""
    shown = interleave(groups, facts.config.report.thumbnails)
    cards = [_failure_card(facts, failed) for failed in shown]
    return {"errors": {"rows": rows, "sentence": sentence}, "failed": cards}


def _failure_card(facts: ReportFacts, failed: FailedRow) -> dict[str, str]:
    thumbnail = facts.thumbnails.get((failed.shard, failed.row))
    name = file_name(failed.uri) or "no URI"
    stage, error_type = safe_excerpt(failed.stage, 20), safe_excerpt(failed.error_type, 60)
    return {
        "data": thumbnail.data if thumbnail else "",
        "alt": f"{name}, failed at {stage} with {error_type}",
        "title": f"{stage} {error_type}",
        "percent": "",
        "message": safe_excerpt(failed.message, 240),
        "uri": safe_excerpt(failed.uri, 400),
        "name": name,
    }


def _with_tracebacks(rows: list[FailedRow]) -> list[tuple[FailedRow, str]]:
    """Return failed rows with their tracebacks; the traceback of a fault is given once."""
    seen: set[str] = set()
    with_tracebacks = []
    for failed in rows:
        frame = last_frame(failed.traceback)
        traceback = "" if frame in seen else safe_excerpt(failed.traceback or "", MAX_CHARACTERS)
        with_tracebacks.append((failed, traceback))
        seen.add(frame)
    return with_tracebacks
