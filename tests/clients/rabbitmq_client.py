"""RabbitMQ by pika: python rabbitmq_client.py HOST PORT. Publishes, is confirmed, consumes, and lives on heartbeats."""

import os
import sys
import time

import pika

parameters = pika.ConnectionParameters(
    sys.argv[1], int(sys.argv[2]), heartbeat=1, socket_timeout=20, blocked_connection_timeout=20
)


def until(what, connection, done):
    """Lets the connection work until `done`, at most 30 s."""
    ends = time.monotonic() + 30
    while not done():
        assert time.monotonic() < ends, what
        connection.process_data_events(time_limit=0.2)


with pika.BlockingConnection(parameters) as connection:
    channel = connection.channel()
    channel.confirm_delivery()
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.exchange_declare("orders", "topic")
    channel.queue_bind(queue, "orders", "order.*")

    # basic_publish raises when the broker does not confirm, or cannot route a mandatory message.
    bodies = [b"%d " % number + os.urandom(number * 40) for number in range(500)]
    for number, body in enumerate(bodies):
        properties = pika.BasicProperties(message_id=str(number), headers={"kind": "test"})
        channel.basic_publish("orders", "order.new", body, properties, mandatory=True)
    big = os.urandom(4 * 1024 * 1024)
    channel.basic_publish("orders", "order.big", big, mandatory=True)
    try:
        channel.basic_publish("orders", "elsewhere", b"", mandatory=True)
        raise SystemExit("confirmed, and nobody has it")
    except pika.exceptions.UnroutableError:
        pass

    got = []

    def take(channel, method, properties, body):
        got.append(body)
        channel.basic_ack(method.delivery_tag)

    channel.basic_qos(prefetch_count=20)
    channel.basic_consume(queue, take)
    until("every message is consumed", connection, lambda: len(got) == len(bodies) + 1)
    assert got == bodies + [big]
    assert channel.queue_declare(queue, passive=True).method.message_count == 0

    # Nothing but heartbeats for a while; without them either side would close after 3 s.
    checker = connection._impl._heartbeat_checker
    received, sent = checker._heartbeat_frames_received, checker._heartbeat_frames_sent
    until(
        "heartbeats in both directions",
        connection,
        lambda: checker._heartbeat_frames_received >= received + 6 and checker._heartbeat_frames_sent >= sent + 6,
    )
    channel.basic_publish("orders", "order.late", b"still here", mandatory=True)
    until("the last message", connection, lambda: got[-1] == b"still here")
print("ok")
