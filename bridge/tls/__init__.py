"""Certificates, and the TLS connections of the command.

certificates.py reads, checks and makes certificates, transport.py makes handshakes of them and says what a
data connection must show. Both need pyOpenSSL (`pip install 'pyftpdlib-gevent[tls]'`), so nothing is imported
here: import them where TLS is wanted.

They never read options: a wrong file is a ConfigError. Begin with transport.py.
"""
