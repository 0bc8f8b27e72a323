"""Sends mails: python smtp_client.py HOST PORT. The client says nothing until the server has spoken."""

import smtplib
import sys

for number in range(3):
    with smtplib.SMTP(sys.argv[1], int(sys.argv[2]), local_hostname="test", timeout=10) as smtp:
        code, banner = smtp.ehlo()
        assert code == 250 and b"mail.test" in banner, banner
        body = "Subject: test\r\n\r\n" + "x" * 70 + "\r\n" + ("y" * 70 + "\r\n") * 10_000
        assert smtp.sendmail("a@test", ["b@test"], body) == {}
print("ok")
