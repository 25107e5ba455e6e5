"""What both judges share: arguments, name resolution for virtual hosts, small assertions."""
import argparse
import socket

DOMAIN = "oss.test"
DOMAINS = (DOMAIN, "s3.test")


def arguments():
    p = argparse.ArgumentParser(description="Judges an OSS server with an official SDK. Exit code 0: it passed.")
    p.add_argument("port", type=int, help="port on 127.0.0.1")
    p.add_argument("--key", default="efckey")
    p.add_argument("--secret", default="efcsecret")
    p.add_argument("--sts-key", default="STS.efckey")
    p.add_argument("--sts-secret", default="stssecret")
    p.add_argument("--sts-token", default="ststoken/+=")
    p.add_argument("--region", default="cn-hangzhou")
    return p.parse_args()


def resolve_test_domain():
    """BUCKET.oss.test and BUCKET.s3.test are this machine, so that virtual-host style needs no DNS."""
    real = socket.getaddrinfo

    def lookup(host, *rest, **named):
        name = host.decode() if isinstance(host, bytes) else host
        if any(name == d or name.endswith("." + d) for d in DOMAINS):
            host = "127.0.0.1"
        return real(host, *rest, **named)

    socket.getaddrinfo = lookup


def equal(got, want, what=""):
    if got != want:
        raise AssertionError(f"{what}: got {got!r}, want {want!r}")


def refused(status, code, call, *, error, read):
    """`call` must raise `error`, of which `read` tells (status, code)."""
    try:
        call()
    except error as e:
        equal(read(e), (status, code), f"refusal ({e})")
        return e
    raise AssertionError(f"was not refused with {status} {code}")
