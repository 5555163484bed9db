"""The way to the tracking store: its address, and for a server the proxy, certificates and token that are used.

A failure on the way looks like one of the server. What is said about it names the option or the variable that led
there, and what to change.
"""

import os
import re
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from shufflenet_mlflow.errors import TrackingError
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.uris import check_store_file, is_server, uri_in_force

_PROXY_SCHEMES = ("http", "https", "socks4", "socks4a", "socks5", "socks5h")
_CERTIFICATE_VARIABLES = (
    *("MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_CLIENT_CERT_PATH"),
    *("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)

_REQUEST = re.compile(r"(?:API request to|for url:) (https?://\S+)", re.IGNORECASE)
_TUNNEL = re.compile(r"Tunnel connection failed: (\d{3})")
_PROXY_WANTS_PASSWORD = re.compile(r"Tunnel connection failed: 407|error code 407\b|too many 407 |^407 ")
_NOT_HTTPS = re.compile(r"WRONG_VERSION_NUMBER|UNKNOWN_PROTOCOL|record layer failure", re.IGNORECASE)
_WANTS_HTTPS = re.compile(r"sent to HTTPS port|to an HTTPS server", re.IGNORECASE)
_ENDED_AT_ONCE = re.compile(r"Remote end closed connection|BadStatusLine")
_CERTIFICATE = re.compile(r"certificate verify failed: ([^'\"]*?)\.? \(_ssl")
_MISSING_FILE = re.compile(r"invalid path: (.+?)\)*$", re.MULTILINE)
_WRONG_VALUE = re.compile(r"Failed to convert (?P<value>.*) for (?P<name>MLFLOW_\w+):")
_UNREACHABLE = re.compile(
    r"Connection refused|Name or service not known|Temporary failure in name resolution|timed out"
)


@dataclass(frozen=True)
class Route:
    """Way to a store: the options and variables that chose it.

    Args:
        uri: the store's address.
        setting: the option or variable that the address is from; None if it is from neither.
    """

    uri: str
    setting: str | None = None

    @classmethod
    def to(cls, tracking_uri: str | None) -> "Route":
        """Return the route to the store at `tracking_uri`, by default the one that MLflow itself would use."""
        given = "--tracking-uri" if tracking_uri else None
        variable = "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else None
        return cls(uri_in_force(tracking_uri), given or variable)

    def to_be(self, address: str) -> str:
        """Return how to set another address, as it would be typed."""
        if self.setting is None:
            return address
        return f"{self.setting}{' ' if self.setting.startswith('-') else '='}{address}"


@dataclass(frozen=True)
class Proxy:
    """A proxy that requests go through.

    Args:
        address: its host and port.
        source: the variable that names it.
    """

    address: str
    source: str

    def __str__(self) -> str:
        return f"the proxy {self.address} ({self.source})"


def check_store(tracking_uri: str | None) -> None:
    """Check the address of the store in force, and the proxy on the way to it; nothing is contacted.

    Raises:
        TrackingError: one of them cannot be valid; the message names the variable that it is from.
    """
    route = Route.to(tracking_uri)
    try:
        check_store_file(route.uri)
    except TrackingError as error:
        if tracking_uri or route.setting is None:
            raise
        raise TrackingError(f"{route.setting}: {error}", code=error.code) from None
    check_proxy(route.uri)


def check_proxy(uri: str) -> None:
    """Raise TrackingError if requests to `uri` would go through a proxy whose address cannot be valid."""
    if not is_server(uri):
        return
    variable = _proxy_variable(urlsplit(redact(uri)).scheme)
    if variable is None:
        return
    value = os.environ[variable]
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        valid = parts.scheme in _PROXY_SCHEMES and parts.hostname and parts.port != 0
    except ValueError:  # a port beyond 65535, or none
        valid = False
    if valid or proxy_of(uri) is None:
        return
    host = urlsplit(redact(uri)).hostname
    raise TrackingError(
        f"{variable}={value.rpartition('@')[2]} is not the address of a proxy; give one such as http://HOST:3128, or, "
        f"if {host} is reachable without it, {_around(host)}",
        code="proxy-address",
    )


def proxy_of(url: str) -> Proxy | None:
    """Return the proxy that requests to `url` go through; None if they go straight to it."""
    from requests.utils import get_environ_proxies, select_proxy

    bare = redact(url)
    address = select_proxy(bare, get_environ_proxies(bare, no_proxy=None))
    if not address:
        return None
    return Proxy(
        address.rpartition("@")[2].rpartition("//")[2].rstrip("/"),
        _proxy_variable(urlsplit(bare).scheme) or "from the system's settings",
    )


def _proxy_variable(scheme: str) -> str | None:
    """Return the variable that names the proxy for a scheme; one in small letters comes first, even an empty one."""
    for name in (f"{scheme}_proxy", "all_proxy"):
        variable = name if name in os.environ else name.upper()
        if os.environ.get(variable):
            return variable
    return None


def _around(host: str | None) -> str:
    """Return how a host is exempted from the proxy."""
    variable = "no_proxy" if os.environ.get("no_proxy") else "NO_PROXY"
    return f"add {host} to {variable}" if os.environ.get(variable) else f"set {variable}={host}"


def explain(error: BaseException) -> str | None:
    """Return what is wrong on the way to a server, and what to change; None if that is not where the error is from."""
    text = str(error)
    if "in header value" in text or "codec can't encode" in text:
        # It is not shown: it may be the token itself.
        return "MLFLOW_TRACKING_TOKEN cannot be sent: it holds a line break or a letter beyond Latin-1"
    if missing := _MISSING_FILE.search(text):
        named = [f"{name}=" for name in _CERTIFICATE_VARIABLES if os.environ.get(name) == missing[1]]
        return f"{''.join(named[:1])}{missing[1]} is not a file; it should hold certificates"
    if wrong := _WRONG_VALUE.search(text):
        return f"{wrong['name']}={wrong['value']} cannot be used; correct it, or unset it for MLflow's default"
    if "databricks" in text.lower() and "credential" in text:
        return (
            "Databricks needs credentials: DATABRICKS_HOST and DATABRICKS_TOKEN, or a profile in ~/.databrickscfg "
            "(databricks://PROFILE)"
        )
    route, url = _way_of(error)
    if url is None:
        return None
    return _explain_proxy(text, url) or _explain_server(text, route, url)


def _explain_proxy(text: str, url: SplitResult) -> str | None:
    proxy = proxy_of(url.geturl())
    if proxy is None:
        return None
    way_around = f"if {url.hostname} is reachable without it, {_around(url.hostname)}"
    if _PROXY_WANTS_PASSWORD.search(text):
        return f"{proxy} wants a user and a password (status 407), which belong before its host; {way_around}"
    if tunnel := _TUNNEL.search(text):
        return f"{proxy} answered with status {tunnel[1]}; {way_around}"
    if "ProxyError" in text or "Unable to connect to proxy" in text:
        found = _UNREACHABLE.search(text)
        detail = f": {found[0][0].lower()}{found[0][1:]}" if found else ""
        return f"{proxy} cannot be reached{detail}; {way_around}"
    return None


def _explain_server(text: str, route: Route, url: SplitResult) -> str | None:
    if url.scheme == "https" and _NOT_HTTPS.search(text):
        return f"{url.netloc} does not speak https; if it speaks http: {route.to_be(_address(route, url, 'http'))}"
    if url.scheme == "http" and _WANTS_HTTPS.search(text):
        return f"{url.netloc} expects https: {route.to_be(_address(route, url, 'https'))}"
    if certificate := _CERTIFICATE.search(text):
        return (
            f"the certificate of {url.netloc} is not accepted ({certificate[1]}); "
            "MLFLOW_TRACKING_SERVER_CERT_PATH=FILE names one to trust"
        )
    if "Invalid Host header" in text:
        return f"the server refuses the name {url.netloc}; start it with --allowed-hosts {url.netloc}"
    if re.search(r"Exceeded \d+ redirects", text):
        return "the address redirects in a circle: it is not MLflow's"
    return None


def hint(error: BaseException, *, is_foreign: bool) -> str:
    """Return what else may be wrong on the way to a server that failed; empty if there is no sign of anything.

    Args:
        is_foreign: the answer was not one of MLflow's, or was that there is nothing at that address.
    """
    route, url = _way_of(error)
    if url is None:
        return ""
    if proxy := proxy_of(url.geturl()):
        return f"; {proxy} is in between: if {url.hostname} is reachable without it, {_around(url.hostname)}"
    if url.scheme == "http" and _ENDED_AT_ONCE.search(str(error)):
        return f"; if it expects https: {route.to_be(_address(route, url, 'https'))}"
    if is_foreign and is_server(route.uri):
        path = urlsplit(redact(route.uri)).path.strip("/")
        address = _address(route, url, url.scheme)
        if path:
            return f"; if the path is wrong: {route.to_be(address.removesuffix(f'/{path}'))}"
        return f"; if MLflow is behind a path there (--static-prefix): {route.to_be(f'{address}/PATH')}"
    return ""


def _way_of(error: BaseException) -> tuple[Route, SplitResult | None]:
    """Return the route to the store, and the address of the request: the store's, or that of an artifact."""
    route: Route = getattr(error, "route", Route(""))
    named = _REQUEST.search(str(error))
    url = redact(named[1].rstrip(".,;")) if named else redact(route.uri)
    try:
        parts = urlsplit(url)
        return route, parts if is_server(url) and parts.hostname else None
    except ValueError:
        return route, None


def _address(route: Route, url: SplitResult, scheme: str) -> str:
    """Return the server's address with another scheme."""
    path = urlsplit(redact(route.uri)).path.rstrip("/") if is_server(route.uri) else ""
    return f"{scheme}://{url.netloc}{path}"
