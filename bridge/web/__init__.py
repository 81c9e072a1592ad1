"""Metrics, health and a status page over HTTP, on the FTP server's own hub.

app.py is the WSGI application, auth.py says who may see what, counts.py counts, metrics.py is what one
process reports, exposition.py writes it for Prometheus, page.py, status.css and status.js for a browser.
Needs prometheus_client and psutil when it is started (`pip install 'pyftpdlib-gevent[metrics]'`).

It only reads sessions, and disconnects them when an administrator asks. Begin with app.py.

Public names: CountingMixin, Guard, ReportingMixin, Web, administrator.
"""

from bridge.web.app import Web
from bridge.web.auth import ENVIRONMENT, Guard, administrator
from bridge.web.counts import CountingMixin
from bridge.web.metrics import ReportingMixin

__all__ = ["ENVIRONMENT", "CountingMixin", "Guard", "ReportingMixin", "Web", "administrator"]
