"""s3-bucket.py HOST:PORT KEY SECRET BUCKET: waits until an S3 server answers, and makes a bucket."""
import datetime
import hashlib
import hmac
import http.client
import sys
import time

address, key, secret, bucket = sys.argv[1:]


def sign(message: str, *parts: str) -> str:
    """AWS Signature Version 4, for a request without a body."""
    step = ("AWS4" + secret).encode()
    for part in parts:
        step = hmac.new(step, part.encode(), hashlib.sha256).digest()
    return hmac.new(step, message.encode(), hashlib.sha256).hexdigest()


def make_bucket() -> int:
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    day, empty = now[:8], hashlib.sha256(b"").hexdigest()
    names = "host;x-amz-content-sha256;x-amz-date"
    headers = f"host:{address}\nx-amz-content-sha256:{empty}\nx-amz-date:{now}\n"
    request = f"PUT\n/{bucket}\n\n{headers}\n{names}\n{empty}"
    scope = f"{day}/us-east-1/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    signature = sign(text, day, "us-east-1", "s3", "aws4_request")
    credential = f"AWS4-HMAC-SHA256 Credential={key}/{scope}, SignedHeaders={names}, Signature={signature}"
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.request(
        "PUT",
        f"/{bucket}",
        headers={"x-amz-content-sha256": empty, "x-amz-date": now, "Authorization": credential},
    )
    return connection.getresponse().status


deadline = time.monotonic() + 60
while True:
    try:
        status = make_bucket()
        if status in (200, 409):
            sys.exit(0)
        problem = f"status {status}"
    except OSError as error:
        problem = str(error)
    if time.monotonic() > deadline:
        sys.exit(f"{address} made no bucket: {problem}")
    time.sleep(0.2)
