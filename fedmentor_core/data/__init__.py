"""Data of a study: from files to units, splits and token ids.

``sources`` (configuration) -> ``corpora``, ``mapping``, ``invented`` (rows) -> ``records``, ``text`` (repair) ->
``units`` (units, splits, digests) -> ``loading`` (``load_study_data``, ``load_domain_data``) -> ``encode``.
``describe`` reports on loaded data; ``catalogue`` and ``fetch`` get the public corpora. Private text stays in rows
and datasets: no error, log line, digest or report holds any.
"""
