"""What travels between server and clients, in as few bits as asked: the codecs and their envelope (docs/wire.md)."""
