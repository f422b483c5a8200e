"""What a site's worker runs: one request of a study, under the site's own file.

The worker polls Prefect and opens no port. It is told where the site's file is by ``FEDMENTOR_SITE_FILE``; the request
holds no path. What comes back is a signed answer in the study's store; this flow returns nothing.
"""

from prefect import flow

from fedmentor_core.discretion import discreet
from fedmentor_core.errors import SiteError
from fedmentor_core.site.answering import answer_or_tell
from fedmentor_core.site.file import site_file_of_environment
from fedmentor_core.site.requests import SiteRequest
from tasks.gpu_slots import gpu_limit_of_environment, prefect_slot


@flow(name="client-site", persist_result=False, log_prints=False, validate_parameters=True)
@discreet
def client_site(request: SiteRequest) -> None:
    """Plan, train or evaluate one domain at its site.

    Args:
        request: what the server asks; the site's own file completes it, and its policy may refuse it.
    """
    with prefect_slot(None if request.kind == "plan" else gpu_limit_of_environment()):
        failure = answer_or_tell(request, site_file_of_environment)
    if failure is not None:
        raise SiteError(failure.reason)
