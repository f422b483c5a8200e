"""What every cell shared, so that the numbers mean the same; and where and how they were made."""

from fedmentor_core.compare.records import ComparisonTable
from fedmentor_core.report import words


def identities(table: ComparisonTable) -> list[tuple[str, str]]:
    """Digests of what was compared on, the scorers, and the machine."""
    pairs: list[tuple[str, str]] = []
    if table.identity is not None:
        one = table.identity
        pairs += [
            ("Backbone sha256", one.backbone_sha256),
            ("BERTScore by", one.scorers.bertscore),
            ("ROUGE-L by", one.scorers.rouge),
            ("Toxicity by", one.scorers.toxicity),
            ("An output is safe when", f"its toxicity is below {one.scorers.safe_threshold:g}"),
            ("Evaluation settings sha256", one.evaluation_sha256),
        ]
        pairs += [(name[:1].upper() + name[1:].replace("_", " "), str(n)) for name, n in one.schedule.items()]
        pairs += [(f"Splits of {domain}", digest) for domain, digest in one.splits.items()]
    pairs += [(name[:1].upper() + name[1:].replace("_", " "), value) for name, value in table.machine.items()]
    pairs.append(("Time of all cells", words.show_seconds(table.seconds_total)))
    return [(name, words.hide_credentials(value)) for name, value in pairs if value]
