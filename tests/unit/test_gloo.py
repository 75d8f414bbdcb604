import socket

from llm4msr.training.gloo import interface_of


def test_an_address_is_that_of_an_interface():
    names = [name for _, name in socket.if_nameindex()]
    assert interface_of("127.0.0.1") == "lo" and "lo" in names
    assert interface_of("203.0.113.7") is None  # of nobody: kept for documents
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect(("192.0.2.1", 9))  # sends nothing
        own = route.getsockname()[0]
    assert interface_of(own) in names
