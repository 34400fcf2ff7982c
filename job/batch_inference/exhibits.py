"""What a report shows of rows: classes, confidences, columns, images, errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batch_inference import charts, failures
from batch_inference.census import BINS, MOST_CLASSES, Census, Sample
from batch_inference.tracebacks import MOST, place
from batch_inference.wording import NO_NUMBER, figure, name_of, percent, shown, whole

if TYPE_CHECKING:
    from batch_inference.report import Facts

MOST_CLASS_ROWS = 30
_MOST_ERROR_ROWS = 50
_MOST_COLUMN_ROWS = 60


def predictions(facts: Facts) -> dict[str, Any]:
    """Classes, confidences and columns."""
    census = facts.census
    sampled = ""
    if census is not None and not census.whole:
        sampled = (
            f"From {census.rows:,} predictions in {census.files_read:,} of {census.files:,} files, taken at random; there was no "
            "time for more. batch-inference report reads them again."
        )
    return {
        "predictions": facts.tally.predictions,
        "sampled": sampled,
        "classes": _classes(census),
        "confidences": _confidences(census),
        "columns": _columns(census),
    }


def _classes(census: Census | None) -> dict[str, Any] | None:
    if census is None or not census.class_column or not census.rows:
        return None
    if census.too_many_classes:
        return None
    total = sum(census.classes.values())
    # Of classes with the same count the first by name, so that the same job makes the same report.
    ranked = sorted(census.classes.items(), key=lambda item: (-item[1], item[0]))
    top, rest = ranked[:MOST_CLASS_ROWS], ranked[MOST_CLASS_ROWS:]
    largest = top[0][1]
    number = len(ranked)
    prefix = "" if census.class_column == "label" else "class "
    remaining = sum(count for _, count in rest)
    return {
        "title": f"The {len(top)} most frequent classes" if rest else "Classes",
        "sentence": f"{number:,} different value{'s' * (number != 1)} of {shown(census.class_column)} in {total:,} predictions.",
        "rows": [
            {
                "name": prefix + (shown(name, 100) or "no label"),
                "count": f"{count:,}",
                "percent": percent(count, total),
                "width": round(100 * count / largest, 2),
            }
            for name, count in top
        ],
        "rest": {"name": f"{len(rest):,} others", "count": f"{remaining:,}", "percent": percent(remaining, total)}
        if rest
        else None,
    }


def _confidences(census: Census | None) -> dict[str, Any] | None:
    if census is None or census.confidences is None or not census.confidences.sum():
        return None
    counts = census.confidences
    total = int(counts.sum())
    numbers = census.numbers["confidence"]
    half = int(counts[: BINS // 2].sum())
    sentence = (
        f"Mean {figure(numbers.mean)}, from {figure(numbers.least)} to {figure(numbers.most)}; "
        f"{percent(half, total)} of the predictions are below 0.5."
    )
    if census.outside:
        sentence += f" {census.outside:,} are not between 0 and 1 and not drawn."
    if numbers.missing:
        sentence += f" {numbers.missing:,} are missing."
    svg = charts.bars(
        "confidence",
        "Predictions by confidence",
        sentence,
        [float(count) for count in counts],
        {round(BINS * part / 4): f"{part / 4:g}" for part in range(5)},
        text=whole,
    )
    return {"svg": svg, "sentence": f"Predictions by confidence. {sentence}"}


def _columns(census: Census | None) -> dict[str, Any] | None:
    if census is None or not census.columns:
        return None
    rows = []
    for column in census.columns[:_MOST_COLUMN_ROWS]:
        numbers = census.numbers.get(column.name)
        values = {"least": "", "mean": "", "most": "", "missing": ""}
        if numbers is not None:
            values = {
                "least": figure(numbers.least) if numbers.count else NO_NUMBER,
                "mean": figure(numbers.mean),
                "most": figure(numbers.most) if numbers.count else NO_NUMBER,
                "missing": f"{numbers.missing:,}",
            }
        shape = column.shape or ("one value" if column.name in census.numbers or "string" in column.type else "")
        rows.append({"name": shown(column.name, 80), "type": shown(column.type, 120), "shape": shape, **values})
    more = len(census.columns) - len(rows)
    sentence = "What the predictor wrote for each image; the shape is that of one image's value."
    if census.too_many_classes:
        sentence += f" {census.class_column} has more than {MOST_CLASSES:,} different values, which are not counted."
    return {"rows": rows, "sentence": sentence + (f" {more:,} more columns are not listed." if more else "")}


def images(facts: Facts) -> dict[str, Any]:
    """Walls of pictures from both ends of the confidences."""
    census = facts.census
    walls = []
    if census is not None and facts.config.report.thumbnails:
        if census.highest:
            # Of few predictions both ends would be the same images.
            known = census.numbers["confidence"].count
            half = min(len(census.highest), -(-known // 2))
            walls.append(("Most confident", "The highest confidences, highest first.", census.highest[:half]))
            walls.append(("Least confident", "The lowest confidences, lowest first.", census.lowest[: known - half]))
        elif census.some:
            walls.append(("Some predictions", "The predictions have no column confidence to sort by.", census.some))
    return {
        "walls": [
            {"title": title, "sentence": sentence, "cards": [_card(facts, one) for one in samples]}
            for title, sentence, samples in walls
            if samples
        ],
        "no_walls": "" if facts.config.report.thumbnails else ", since report.thumbnails is 0",
    }


def _card(facts: Facts, sample: Sample) -> dict[str, str]:
    picture = facts.pictures.get((sample.shard, sample.row))
    uri = picture.uri if picture else ""
    name = name_of(uri) or f"row {sample.row} of shard {sample.shard}"
    confidence = "" if sample.confidence is None else _confidence(sample.confidence)
    reason = picture.reason if picture else "the image was not read"
    said = shown(sample.text, 100)
    return {
        "data": picture.data if picture else "",
        "alt": f"{name}, predicted {said}"
        + ("" if picture and picture.data else f", no picture: {shown(reason, 160)}"),
        "title": said,
        "percent": confidence,
        "message": "" if picture and picture.data else shown(reason, 160),
        "uri": shown(uri, 400),
        "name": name,
    }


def _confidence(value: float) -> str:
    return percent(value, 1.0) if 0 <= value <= 1 else figure(value)


def _failed_card(facts: Facts, one: failures.Failure) -> dict[str, str]:
    picture = facts.pictures.get((one.shard, one.row))
    name = name_of(one.uri) or "no URI"
    kind = shown(one.error_type, 60)
    return {
        "data": picture.data if picture else "",
        "alt": f"{name}, failed at {shown(one.stage, 20)} with {kind}",
        "title": f"{shown(one.stage, 20)} {kind}",
        "percent": "",
        "message": shown(one.message, 240),
        "uri": shown(one.uri, 400),
        "name": name,
    }


def _with_traces(found: list[failures.Failure]) -> list[tuple[failures.Failure, str]]:
    """Failures and their tracebacks, each fault's once."""
    told: set[str] = set()
    out = []
    for one in found:
        where = place(one.traceback)
        out.append((one, shown(one.traceback or "", MOST) if where not in told else ""))
        told.add(where)
    return out


def errors(facts: Facts) -> dict[str, Any]:
    """Failed rows by stage and type, and a wall of them."""
    kinds, tally = facts.failures, facts.tally
    rows = [
        {
            "stage": shown(kind.stage, 20),
            "type": shown(kind.error_type, 60),
            "count": f"{kind.count:,}",
            "percent": percent(kind.count, tally.errors),
            "examples": [
                {"uri": shown(one.uri, 300) or "no URI", "message": shown(one.message, 400), "trace": trace}
                for one, trace in _with_traces(kind.found[: failures.EXAMPLES])
            ],
        }
        for kind in kinds[:_MOST_ERROR_ROWS]
    ]
    more = len(kinds) - len(rows)
    sentence = (
        f"{tally.errors:,} of {tally.rows:,} rows failed ({percent(tally.errors, tally.rows)}); all are in errors/."
    )
    sentence += f" {more:,} more kinds are not listed." if more > 0 else ""
    wall = failures.wall(kinds, facts.config.report.thumbnails)
    return {"errors": {"rows": rows, "sentence": sentence}, "failed": [_failed_card(facts, one) for one in wall]}
