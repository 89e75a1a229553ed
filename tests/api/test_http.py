"""annd serve from outside: the wire contract, the limits of the transport, starting and stopping.

Only http.client and sockets speak to it: what a client library would hide is what is tested."""
import base64
import http.client
import json
import pathlib
import signal
import socket
import subprocess
import threading
import time

import numpy as np
import pytest

from conftest import Server, clustered, exact, free_port, write_bin

ROWS, DIM = 1500, 16
V2 = "/v2/vectordb/"
BIG = 445127262333941301  # no double holds it


class Client:
    """One kept-alive connection."""

    def __init__(self, address, timeout=30):
        self.connection = http.client.HTTPConnection(address, timeout=timeout)

    def send(self, method, path, body=None, headers=None):
        self.connection.request(method, path, body, headers or {})
        answer = self.connection.getresponse()
        return answer, answer.read()

    def post(self, path, body, status=200, **headers):
        if not isinstance(body, (bytes, str)):
            body = json.dumps(body)
        answer, text = self.send("POST", V2 + path, body,
                                 {k.replace("_", "-"): v for k, v in headers.items()})
        assert answer.status == status, (answer.status, text)
        assert answer.getheader("Content-Type") == "application/json; charset=utf-8"
        return json.loads(text)

    def good(self, path, body, **headers):
        out = self.post(path, body, **headers)
        assert out["code"] == 0, out
        return out

    def bad(self, code, path, body, says="", status=200, **headers):
        out = self.post(path, body, status, **headers)
        assert out["code"] == code and says in out["message"], out
        assert set(out) == {"code", "message"}
        return out["message"]


class Site:
    """A data directory with one collection of each kind, and a server on it."""

    def __init__(self, annd, folder):
        self.folder, self.data = folder, folder / "data"
        self.base, self.queries = {}, {}
        for name, kind, metric in (("photos", "f32", "cosine"), ("bytes", "u8", "l2"),
                                   ("signed", "i8", "ip"), ("named", "f32", "l2"),
                                   ("typed", "f32", "cosine"), ("broken", "f32", "l2")):
            self.make(annd, name, kind, metric)
        number = sorted(p.name for p in (self.data / "collections").iterdir())[-1]
        path = self.data / "collections" / number / "schema.json"
        text = path.read_bytes()
        path.unlink()
        path.write_bytes(text.replace(b"{", b"[", 1))
        self.server = Server(annd, self.data, "--memory", "256M", "--threads", 2)
        self.address = self.server.listen

    def make(self, annd, name, kind, metric):
        folder = self.folder / name
        folder.mkdir()
        base, queries = clustered(ROWS, DIM, kind, queries=20)
        if name == "named":
            base[700:710] = base[7]  # ties
        self.base[name], self.queries[name] = base, queries
        options = []
        if name in ("photos", "named"):
            options += ["--attributes", folder / "rows.jsonl"]
            with open(folder / "rows.jsonl", "w", encoding="utf-8") as out:
                for i in range(ROWS):
                    row = {"path": f"/a/\u00e9{i}.jpg", "year": 2000 + i % 20, "score": i / 7,
                           "tags": ["a", i], "nested": {"k": BIG}, "flag": i % 2 == 0}
                    out.write(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n")
        if name == "named":
            (folder / "keys.txt").write_text("".join(f"key-{i:05d}\n" for i in range(ROWS)))
            options += ["--keys", folder / "keys.txt"]
        if name == "typed":
            schema = {"enableDynamicField": False, "fields": [
                {"fieldName": "pk", "dataType": "Int64", "isPrimary": True},
                {"fieldName": "emb", "dataType": "FloatVector", "elementTypeParams": {"dim": DIM}},
                {"fieldName": "small", "dataType": "Int16"},
                {"fieldName": "big", "dataType": "Int64"},
                {"fieldName": "real", "dataType": "Float"},
                {"fieldName": "text", "dataType": "VarChar", "nullable": True,
                 "elementTypeParams": {"max_length": 64}},
                {"fieldName": "meta", "dataType": "JSON", "nullable": True},
                {"fieldName": "list", "dataType": "Array", "elementDataType": "Int64",
                 "elementTypeParams": {"max_capacity": 8}},
                {"fieldName": "kind", "dataType": "VarChar", "defaultValue": "none",
                 "elementTypeParams": {"max_length": 16}}]}
            (folder / "schema.json").write_text(json.dumps(schema))
            with open(folder / "rows.jsonl", "w", encoding="utf-8") as out:
                for i in range(ROWS):
                    out.write(json.dumps({"small": i - 700, "big": BIG + i, "real": 0.1,
                                          "text": None if i % 2 else f"t{i}",
                                          "meta": {"a": [1, None]}, "list": [BIG, i][:i % 3],
                                          **({"kind": "x"} if i % 2 else {})}) + "\n")
            options += ["--schema", folder / "schema.json", "--attributes", folder / "rows.jsonl"]
        annd("build", write_bin(folder / "base", base), "--output", folder / "index", "--metric",
             metric, "--max-degree", 24, "--build-list", 50, *options)
        annd("attach", folder / "index", "--data", self.data, "--as", name, "--copy")


@pytest.fixture(scope="module")
def site(annd, tmp_path_factory):
    made = Site(annd, tmp_path_factory.mktemp("site"))
    yield made
    made.server.__exit__()


@pytest.fixture
def client(site):
    made = Client(site.address)
    yield made
    made.connection.close()


def vectors(array):
    return [[float(x) for x in row] for row in array]


# ---- collections ----

def test_list_has_and_stats(client):
    assert sorted(client.good("collections/list", {})["data"]) == [
        "broken", "bytes", "named", "photos", "signed", "typed"]
    assert client.good("collections/has", {"collectionName": "photos"})["data"] == {"has": True}
    assert client.good("collections/has", {"collectionName": "no"})["data"] == {"has": False}
    assert client.good("collections/get_stats", {"collectionName": "photos"}) == {
        "code": 0, "data": {"rowCount": ROWS}}
    assert client.good("collections/get_load_state", {"collectionName": "photos"}) == {
        "code": 0, "data": {"loadState": "LoadStateLoaded", "loadProgress": 100}, "message": ""}
    client.bad(100, "collections/get_load_state", {"collectionName": "no"}, "collection not found")
    client.bad(100, "collections/get_stats", {"collectionName": "no"}, "[collection=no]")
    client.bad(100, "collections/describe", {"collectionName": "no"}, "can't find collection")
    client.bad(800, "collections/list", {"dbName": "no"}, "database not found[database=no]")
    client.bad(800, "collections/has", {"collectionName": "photos"}, DB_Name="no")
    client.bad(1802, "collections/describe", {}, "missing required parameters")
    client.bad(1801, "collections/describe", "", "can only accept json format request")


def test_describe_tells_schema_and_indexes(client):
    out = client.good("collections/describe", {"collectionName": "photos"})
    assert out["message"] == ""
    data = out["data"]
    assert data["collectionName"] == "photos" and isinstance(data["collectionID"], int)
    assert data["enableDynamicField"] is True and data["load"] == "LoadStateLoaded"
    assert [(f["name"], f["type"], f["primaryKey"]) for f in data["fields"]] == [
        ("id", "Int64", True), ("vector", "FloatVector", False)]
    assert data["fields"][1]["params"] == [{"key": "dim", "value": str(DIM)}]
    assert data["indexes"] == [
        {"indexName": "vector", "fieldName": "vector", "metricType": "COSINE"}]
    assert data["shardsNum"] == 1 and data["aliases"] == [] and data["consistencyLevel"]
    typed = {f["name"]: f for f in client.good(
        "collections/describe", {"collectionName": "typed"})["data"]["fields"]}
    assert typed["list"]["elementType"] == "Int64"
    assert typed["text"]["nullable"] is True
    assert typed["text"]["params"] == [{"key": "max_length", "value": "64"}]
    assert typed["kind"]["defaultValue"] == {"Data": {"StringData": "none"}}
    types = {name: client.good("collections/describe", {"collectionName": name})["data"]["fields"]
             for name in ("bytes", "signed")}
    assert types["bytes"][1]["type"] == "FloatVector"
    assert types["signed"][1]["type"] == "Int8Vector"
    assert client.good("indexes/list", {"collectionName": "photos"})["data"] == ["vector"]
    index = client.good("indexes/describe", {"collectionName": "photos", "indexName": "vector"})
    assert index["data"][0]["indexState"] == "Finished"
    client.bad(700, "indexes/describe", {"collectionName": "photos", "indexName": "x"})


def test_a_damaged_collection_is_told_and_the_others_serve(client):
    client.bad(2, "collections/describe", {"collectionName": "broken"}, "damaged")
    client.bad(2, "entities/search", {"collectionName": "broken", "data": [[0.0] * DIM]})
    assert client.good("collections/get_load_state", {"collectionName": "broken"})["data"] == {
        "loadState": "LoadStateNotLoad"}


# ---- search ----

@pytest.mark.parametrize("name, metric", [("photos", "cosine"), ("bytes", "l2"), ("signed", "ip")])
def test_search_finds_what_brute_force_finds(site, client, name, metric):
    base, queries = site.base[name], site.queries[name]
    ids, distances = exact(base, queries, metric, 10)
    sent = queries.tolist() if name == "signed" else vectors(queries)
    out = client.good("entities/search", {"collectionName": name, "data": sent, "limit": 10})
    assert out["cost"] == 0 and out["topks"] == [10] * len(queries)
    assert len(out["data"]) == 10 * len(queries)
    found = 0
    for q in range(len(queries)):
        rows = out["data"][q * 10:q * 10 + 10]
        assert all(set(row) == {"id", "distance"} for row in rows)
        found += len({row["id"] for row in rows} & set(ids[q].tolist()))
        values = [row["distance"] for row in rows]
        assert values == sorted(values, reverse=metric != "l2")
        first = 1 - distances[q][0] if metric == "cosine" else distances[q][0]
        if rows[0]["id"] == ids[q][0]:
            assert abs(values[0] - first) <= 2e-3 * max(1, abs(first))
    assert found >= 0.97 * 10 * len(queries)


def test_limit_offset_and_windows(site, client):
    query = {"collectionName": "photos", "data": vectors(site.queries["photos"][:1])}
    all_rows = client.good("entities/search", {**query, "limit": 30})["data"]
    page = client.good("entities/search", {**query, "limit": 10, "offset": 20})
    assert page["data"] == all_rows[20:] and page["topks"] == [10]
    assert len(client.good("entities/search", query)["data"]) == 100
    out = client.good("entities/search", {**query, "limit": 16384})
    assert len(out["data"]) <= ROWS and len(out["data"]) > 0.95 * ROWS
    empty = client.good("entities/search", {**query, "limit": 10, "offset": 16374})
    assert empty == {"code": 0, "cost": 0, "data": []}
    for more, says in (({"limit": 0}, "topk [0] is invalid"), ({"limit": 16385}, "topk [16385]"),
                       ({"offset": -1}, "offset [-1] is invalid"),
                       ({"limit": 10, "offset": 16384}, "offset+topk"),
                       ({"data": []}, "nq [0] is invalid")):
        client.bad(65535, "entities/search", {**query, **more}, says)


def test_output_fields_are_exact(site, client):
    query = {"collectionName": "photos", "data": vectors(site.base["photos"][7:8]), "limit": 1}
    row = client.good("entities/search", {**query, "outputFields": ["*"]})["data"][0]
    assert row["id"] == 7 and row["path"] == "/a/\u00e97.jpg" and row["year"] == 2007
    assert row["nested"] == {"k": BIG} and row["tags"] == ["a", 7] and row["score"] == 1.0
    assert row["flag"] is False
    assert np.array_equal(np.array(row["vector"], np.float32), site.base["photos"][7])
    row = client.good("entities/search", {**query, "outputFields": ["path", " year ", "missing",
                                                                    "$meta[\"flag\"]"]})["data"][0]
    assert set(row) == {"id", "distance", "path", "year", "flag"}
    row = client.good("entities/search", {**query, "outputFields": ["$meta"]})["data"][0]
    assert "vector" not in row and row["year"] == 2007
    many = client.good("entities/search", {**query, "limit": 1000, "outputFields": ["year"]})
    assert len(many["data"]) == 1000
    assert all(row["year"] == 2000 + row["id"] % 20 for row in many["data"])


def test_small_vectors_come_back_as_the_wire_shows_them(site, client):
    out = client.good("entities/get", {"collectionName": "bytes", "id": 9})["data"]
    assert out[0]["vector"] == site.base["bytes"][9].tolist()
    out = client.good("entities/get", {"collectionName": "signed", "id": 9})["data"]
    assert base64.b64decode(out[0]["vector"]) == site.base["signed"][9].tobytes()


def test_typed_fields(client):
    rows = client.good("entities/get", {"collectionName": "typed", "id": [0, 1, 2]})["data"]
    assert [row["pk"] for row in rows] == [0, 1, 2]
    assert [row["small"] for row in rows] == [-700, -699, -698]
    assert rows[1]["big"] == BIG + 1 and rows[0]["text"] == "t0" and rows[1]["text"] is None
    assert isinstance(rows[0]["meta"], str) and json.loads(rows[0]["meta"]) == {"a": [1, None]}
    assert rows[0]["list"] == {"Data": {"LongData": {}}}
    assert rows[2]["list"] == {"Data": {"LongData": {"data": [BIG, 2]}}}
    assert [row["kind"] for row in rows] == ["none", "x", "none"] and rows[0]["real"] == 0.1
    rows = client.good("entities/get", {"collectionName": "typed", "id": 1,
                                        "outputFields": ["big", "small"]},
                       Accept_Type_Allow_Int64="false")["data"]
    assert rows == [{"pk": "1", "big": str(BIG + 1), "small": -699}]
    client.bad(65535, "entities/get", {"collectionName": "typed", "id": 1, "outputFields": ["x"]},
               "field x not exist")
    client.bad(65535, "entities/get", {"collectionName": "typed", "id": 1,
                                       "outputFields": ["meta[\"a\"]"]})


def test_get_by_number_and_text(site, client):
    get = {"collectionName": "photos", "outputFields": ["year"]}
    rows = client.good("entities/get", {**get, "id": [9, "3", 9, 10 ** 15, -1]})
    assert rows == {"code": 0, "cost": 0, "data": [{"id": 3, "year": 2003}, {"id": 9, "year": 2009}]}
    assert client.good("entities/get", {**get, "id": []})["data"] == []
    assert len(client.good("entities/get", {**get, "id": list(range(2000))})["data"]) == ROWS
    client.bad(1806, "entities/get", {**get, "id": "abc"}, "primary key")
    client.bad(1802, "entities/get", get)
    client.bad(1802, "entities/get", {**get, "ID": 1})
    named = {"collectionName": "named", "outputFields": ["path"]}
    rows = client.good("entities/get", {**named, "id": ["key-00009", "key-00003", "nope", 7]})
    assert [row["id"] for row in rows["data"]] == ["key-00003", "key-00009"]
    assert rows["data"][1]["path"] == "/a/\u00e99.jpg"


def test_text_keys_in_searches_and_ties(site, client):
    out = client.good("entities/search", {"collectionName": "named", "limit": 11,
                                          "data": vectors(site.base["named"][7:8])})
    keys = [row["id"] for row in out["data"]]
    assert keys == ["key-00007"] + [f"key-{i:05d}" for i in range(700, 710)]
    assert len({row["distance"] for row in out["data"]}) == 1


def test_int64_as_text_for_javascript(site, client):
    query = {"collectionName": "photos", "data": vectors(site.queries["photos"][:1]), "limit": 2}
    rows = client.good("entities/search", query, Accept_Type_Allow_Int64="false")["data"]
    assert all(isinstance(row["id"], str) and isinstance(row["distance"], float) for row in rows)
    rows = client.good("entities/search", query, Accept_Type_Allow_Int64="nonsense")["data"]
    assert all(isinstance(row["id"], int) for row in rows)


def test_search_parameters(site, client):
    query = {"collectionName": "photos", "data": vectors(site.queries["photos"][:1]), "limit": 5}
    want = client.good("entities/search", query)["data"]
    for good in ({"params": {"search_list": 200}}, {"ef": "300"}, {"params": {"nprobe": 64}},
                 {"level": 10}, {"metricType": "L2"}, {"metric_type": "COSINE", "unknown": {}},
                 {"ef": 1, "params": {"beamwidth": 128}}, {"ef": 2 ** 31 - 1}, None):
        assert client.good("entities/search", {**query, "searchParams": good})["data"][0] == want[0]
    for wrong, says in (({"metric_type": "L2"}, "metric type not match"),
                        ({"ef": 1, "params": {"ef": 2}}, "ambiguous parameter"),
                        ({"params": 7}, "must be a dict"), ({"nprobe": 1.5}, "should be integer"),
                        ({"level": 0}, "should be in range [1, 10]"),
                        ({"radius": "x"}, "radius")):
        client.bad(1100, "entities/search", {**query, "searchParams": wrong}, says)


def test_what_a_read_only_server_cannot_do_is_refused(site, client):
    query = {"collectionName": "photos", "data": vectors(site.queries["photos"][:1]), "limit": 5}
    client.bad(10, "entities/search", {**query, "filter": "year > 2000"}, "filter")
    client.bad(10, "entities/search", {**query, "groupingField": "year"}, "groupingField")
    client.bad(10, "entities/search", {**query, "searchParams": {"radius": 0.1}}, "range search")
    client.bad(65535, "entities/search", {**query, "partitionNames": ["p"]},
               "partition name p not found")
    client.bad(1100, "entities/search", {**query, "consistencyLevel": "STRONG"},
               "consistencyLevel can only be")
    client.bad(1100, "entities/search", {**query, "functionScore": {"functions": [{}]}})
    client.good("entities/search", {**query, "filter": " ", "partitionNames": ["_default"],
                                    "consistencyLevel": "Strong", "groupSize": 0,
                                    "functionScore": {"functions": []}})
    for path in ("entities/insert", "entities/delete", "entities/query", "collections/create",
                 "collections/drop", "indexes/create", "users/list", "jobs/import/create"):
        assert path in client.bad(10, path, {}, "read-only server")


def test_bad_vectors_and_bodies(site, client):
    query = {"collectionName": "photos", "data": [[1.0] * DIM], "limit": 1}
    for data in ([[1.0] * (DIM - 1)], [[1.0] * (DIM + 1)], [1.0] * DIM, [[]], "x", [["a"] * DIM],
                 [{}], 7):
        client.bad(1801, "entities/search", {**query, "data": data},
                   "can only accept json format request")
    client.bad(1801, "entities/search", {**query, "data": [[1.0] * 3]},
               f"dimension: {DIM}, but length of []float: 3")
    client.bad(1801, "entities/search", {**query, "annsField": "x"}, "vector field named: x")
    client.bad(1801, "entities/search", {**query, "limit": "5"}, "limit")
    text = json.dumps(query)
    for wrong in (text[:-1], text + "x", text.replace("1.0", "NaN", 1), text.replace("1.0", "1e999", 1),
                  "[" * 40, b'{"collectionName":"\xff"}', b"\x00", "null"):
        client.bad(1801, "entities/search", wrong)
    deep = '{"x":' * 40 + "1" + "}" * 40
    client.bad(1801, "entities/search", deep, "byte")
    client.bad(1802, "entities/search", {**query, "data": None})
    # Whatever the content type, and keys in any case.
    assert client.post("entities/search", text.replace("collectionName", "COLLECTIONNAME"),
                       Content_Type="text/plain")["code"] == 0


# ---- transport ----

def raw(address, data, timeout=15):
    """Sends bytes and reads until the server closes or the answer is whole."""
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout) as s:
        s.sendall(data)
        out = b""
        while True:
            head = out.find(b"\r\n\r\n")
            if head >= 0:
                length = [int(line.split(b":")[1]) for line in out[:head].split(b"\r\n")
                          if line.lower().startswith(b"content-length:")]
                if length and len(out) >= head + 4 + length[0]:
                    return out
            got = s.recv(65536)
            if not got:
                return out
            out += got


def status(answer):
    return int(answer.split(b" ", 2)[1])


POST = b"POST " + V2.encode() + b"collections/list HTTP/1.1\r\nHost: localhost\r\n"


def test_routes(site, client):
    for method, path in (("POST", "/v2/vectordb/collections/lis"), ("GET", V2 + "collections/list"),
                         ("POST", "/"), ("GET", "/"), ("POST", V2 + "collections/list/"),
                         ("POST", "/v2//vectordb/collections/list"),
                         ("POST", "/v2/vectordb/collections/%6cist"), ("PUT", "/healthz"),
                         ("POST", "/v1/vector/search"), ("HEAD", "/nope"),
                         ("POST", "/v2/vectordb/x/../collections/list"), ("GET", "/" + "x" * 3000)):
        answer, text = client.send(method, path, "{}" if method == "POST" else None)
        assert answer.status == 404, path
        assert text == (b"" if method == "HEAD" else b"404 page not found")
    answer, text = client.send("OPTIONS", V2 + "collections/list")
    assert answer.status == 204 and text == b""
    answer, text = client.send("POST", V2 + "collections/list?x=1", "{}")
    assert answer.status == 200 and answer.getheader("X-Content-Type-Options") == "nosniff"
    assert not answer.getheader("Access-Control-Allow-Origin")


def test_health(client):
    assert client.send("GET", "/healthz")[1] == b"OK"
    answer, text = client.send("HEAD", "/healthz")
    assert answer.status == 200 and text == b""
    assert json.loads(client.send("GET", "/healthz", None, {"Content-Type": "application/json"})[
        1]) == {"state": "OK", "detail": [{"name": "proxy", "code": 1}]}
    assert json.loads(client.send("GET", "/api/v1/health")[1]) == {"status": "ok"}
    answer, text = client.send("GET", "/metrics")
    assert answer.getheader("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
    assert b'annd_searches_total{db_name="default",collection_name="photos"}' in text
    assert b"annd_collections_damaged 1\n" in text


@pytest.mark.parametrize("head, wanted", [
    (b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", 400),
    (b"Content-Length: 2\r\nContent-Length: 2\r\n", 400),
    (b"Content-Length: 2\r\nContent-Length: 3\r\n", 400),
    (b"Content-Length: +2\r\n", 400),
    (b"Content-Length: -2\r\n", 400),
    (b"Content-Length: 2x\r\n", 400),
    (b"Content-Length: 99999999999999999999\r\n", 400),
    (b"Transfer-Encoding: gzip, chunked\r\n", 501),
    (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400),
    (b"Content-Length: 2\r\nHost: other\r\n", 400),
    (b"Content-Length: 2\r\nAuthorization: a\r\nAuthorization: b\r\n", 400),
    (b"Content-Length: 2\r\nX-Bad: a\x01b\r\n", 400),
    (b"Content-Length: 2\r\nX-Bad : a\r\n", 400),
])
def test_ambiguous_framing_is_refused_and_the_connection_closed(site, head, wanted):
    answer = raw(site.address, POST + head + b"\r\n{}POST / HTTP/1.1\r\n\r\n")
    # libmicrohttpd answers some itself, or closes at once.
    assert answer == b"" or status(answer) in (wanted, 400, 413), answer
    assert b"HTTP/1.1 2" not in answer and b"HTTP/1.1 404" not in answer
    if answer:
        assert b"connection: close" in answer.lower()


def test_chunked_bodies_pipelining_and_expect(site):
    chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"
    assert status(raw(site.address, chunked)) == 200
    host, port = site.address.rsplit(":", 1)
    one = POST + b"Content-Length: 2\r\n\r\n{}"
    with socket.create_connection((host, int(port)), 10) as s:
        s.sendall(one * 5 + one.replace(b"POST /v2", b"POST /v3"))
        out = b""
        while out.count(b"HTTP/1.1 ") < 6 or not out.endswith(b"404 page not found"):
            got = s.recv(65536)
            assert got
            out += got
        assert out.count(b"HTTP/1.1 200") == 5
        s.sendall(POST + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert s.recv(1000).startswith(b"HTTP/1.1 100")
        s.sendall(b"{}")
        assert s.recv(65536).startswith(b"HTTP/1.1 200")


def test_too_large_is_413_before_the_body_is_read(site):
    size = 64 * 1024 * 1024 + 1
    answer = raw(site.address, POST + b"Content-Length: %d\r\n\r\n{" % size)
    assert status(answer) == 413 and b'"code":1102' in answer and b"close" in answer.lower()
    # A client that sends it all before it reads gets the answer as well.
    answer = raw(site.address, POST + b"Content-Length: %d\r\n\r\n" % size + b" " * size)
    assert status(answer) == 413
    chunk = b"%x\r\n" % (1 << 20) + b" " * (1 << 20) + b"\r\n"
    answer = raw(site.address, POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 65 +
                 b"0\r\n\r\n", 60)
    assert status(answer) == 413 and b'"code":1102' in answer
    answer = raw(site.address, POST + b"Content-Length: %d\r\n\r\n" % (1 << 25) +
                 b"{" + b" " * ((1 << 25) - 2) + b"}", 60)
    assert status(answer) == 200


def test_headers_that_are_too_large(site):
    answer = raw(site.address, POST + b"X: " + b"y" * 40000 + b"\r\nContent-Length: 2\r\n\r\n{}")
    assert answer == b"" or status(answer) in (413, 431)
    answer = raw(site.address, b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer == b"" or status(answer) in (404, 414, 431)


def test_pages_of_other_origins_are_refused(site, client):
    body = json.dumps({})

    def answer(**headers):
        sent = {k.replace("_", "-"): v for k, v in headers.items()}
        fresh = Client(site.address)
        got, text = fresh.send("POST", V2 + "collections/list", body, sent)
        fresh.connection.close()
        return got.status

    port = site.address.rsplit(":", 1)[1]
    assert answer(Origin="http://evil.example") == 403
    assert answer(Origin="null") == 403
    assert answer(Origin=f"http://evil.example:{port}", Host=f"evil.example:{port}") == 403
    assert answer(Host=f"evil.example:{port}") == 403
    assert answer(Origin=f"http://{site.address}") == 200
    assert answer(Origin=f"http://localhost:{port}", Host=f"localhost:{port}") == 200
    assert answer(Origin=f"http://localhost:{int(port) ^ 1}", Host=f"localhost:{port}") == 403


def test_request_timeout_is_408(site, client):
    query = {"collectionName": "photos", "data": vectors(site.queries["photos"][:1] ) * 4000,
             "limit": 200, "outputFields": ["*"]}
    # More than a second's work: the deadline passes in the search or while rows are fetched. A
    # machine that does it within the second answers, or finds the answer too large.
    out, text = client.send("POST", V2 + "entities/search", json.dumps(query),
                            {"Request-Timeout": "1"})
    code = json.loads(text)["code"]
    assert (out.status, code) in ((408, 10001), (200, 1102), (200, 0))
    assert client.good("entities/search", {**query, "data": query["data"][:1], "limit": 1},
                       Request_Timeout="0")


@pytest.mark.slow
def test_slow_headers_and_bodies_are_cut_off(site):
    host, port = site.address.rsplit(":", 1)
    began = time.monotonic()
    slow = socket.create_connection((host, int(port)), 30)
    idle = Client(site.address)
    idle.good("collections/list", {})
    for byte in POST + b"X: " + b"y" * 400:
        try:
            slow.sendall(bytes([byte]))
        except OSError:
            break
        if select_closed(slow, 0.1):
            break
    assert 9 < time.monotonic() - began < 14
    # An idle connection outlives that.
    idle.good("collections/list", {})


def select_closed(s, seconds):
    s.settimeout(seconds)
    try:
        return s.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_one_address_gets_so_many_connections_and_a_reason(site):
    host, port = site.address.rsplit(":", 1)
    held = [socket.create_connection((host, int(port)), 10) for _ in range(64)]
    time.sleep(0.3)
    extra = [socket.create_connection((host, int(port)), 10) for _ in range(4)]
    refused = [s.recv(4096) for s in extra]
    assert all(text.startswith(b"HTTP/1.1 503") and b'"code":4' in text for text in refused)
    for s in held + extra:
        s.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            Client(site.address).good("collections/list", {})
            return
        except (AssertionError, OSError, http.client.HTTPException):
            time.sleep(0.1)
    raise AssertionError("connections are not given back")


def test_many_clients_at_once_get_the_answers_they_would_get_alone(site):
    queries = vectors(site.queries["photos"])
    alone = Client(site.address)
    want = [alone.good("entities/search", {"collectionName": "photos", "data": [q], "limit": 20,
                                           "outputFields": ["year"]})["data"] for q in queries]
    wrong = []

    def work(start):
        one = Client(site.address)
        for i in range(start, start + 30):
            q = i % len(queries)
            out = one.post("entities/search", {"collectionName": "photos", "data": [queries[q]],
                                               "limit": 20, "outputFields": ["year"]})
            if out.get("data") != want[q]:
                wrong.append(out)
        one.connection.close()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_clients_that_leave_early_do_no_harm(site):
    host, port = site.address.rsplit(":", 1)
    body = json.dumps({"collectionName": "photos", "data": vectors(site.queries["photos"]) * 20,
                       "limit": 100, "outputFields": ["*"]}).encode()
    head = POST.replace(b"collections/list", b"entities/search")
    for cut in (0, 10, len(body) // 2, len(body)):
        for _ in range(4):
            s = socket.create_connection((host, int(port)), 10)
            s.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body[:cut])
            s.close()
    Client(site.address).good("collections/list", {})
    time.sleep(1)
    text = Client(site.address).send("GET", "/metrics")[1].decode()
    running = [line for line in text.splitlines() if line.startswith("annd_http_requests_running")]
    assert int(running[0].split()[1]) <= 2


# ---- start and stop ----

def start(annd, data, *options):
    return subprocess.Popen([annd.path, "serve", "--data", data, *map(str, options)],
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


@pytest.fixture
def small(annd, tmp_path):
    """A data directory of one small collection."""
    base, _ = clustered(400, 8, "f32", queries=1)
    annd("build", write_bin(tmp_path / "base", base), "--output", tmp_path / "index")
    annd("attach", tmp_path / "index", "--data", tmp_path / "data", "--as", "c")
    return tmp_path / "data"


def test_the_start_line_names_what_matters_and_sigterm_ends_well(annd, small, serve):
    server = serve(small)
    held = Client(server.listen)
    held.good("collections/list", {})
    assert server.stop() == 0
    line = server.err.splitlines()[0]
    for word in ("annd ", str(small), server.listen, "io ", "kernels ", "1 collections", "400 rows"):
        assert word in line, line
    assert line[:4].isdigit() and line[23] == "Z"


def test_a_second_listener_serves_health_only(annd, small):
    port, other = free_port(), free_port()
    process = start(annd, small, "--listen", f"127.0.0.1:{port}", "--metrics-listen",
                    f"127.0.0.1:{other}")
    try:
        health = wait_for(f"127.0.0.1:{other}")
        assert health.send("GET", "/metrics")[0].status == 200
        assert health.send("POST", V2 + "collections/list", "{}")[0].status == 404
        # A second server that finds the metrics port taken says so and serves all the same; here
        # it stops at the lock of the data directory.
        second = start(annd, small, "--listen", f"127.0.0.1:{free_port()}")
        _, err = second.communicate(timeout=30)
        assert second.returncode == 9 and "annd: " in err
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def wait_for(address, timeout=30):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            made = Client(address)
            made.send("GET", "/healthz")
            return made
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"{address} does not answer")


def test_a_taken_port_is_an_error_and_a_taken_metrics_port_a_warning(annd, small):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        taken = f"127.0.0.1:{s.getsockname()[1]}"
        annd.fails(1, "serve", "--data", small, "--listen", taken, "--metrics-listen", "off",
                   says=taken)
        free = f"127.0.0.1:{free_port()}"
        process = start(annd, small, "--listen", free, "--metrics-listen", taken)
        assert wait_for(free).send("GET", "/metrics")[0].status == 200
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "WARN" in err and taken in err


@pytest.mark.parametrize("options, says", [
    (("--listen", "0.0.0.0:0"), "0.0.0.0:0"),
    (("--listen", "[::]:0"), "other machines"),
    (("--listen", "127.0.0.1:0", "--metrics-listen", "0.0.0.0:0"), "--metrics-listen"),
    (("--listen", "localhost"), "ADDR:PORT"),
    (("--listen", "127.0.0.1:70000"), "70000"),
    (("--listen", "example.com:80"), "example.com"),
])
def test_addresses_that_are_refused(annd, small, options, says):
    annd.fails(1, "serve", "--data", small, *options, says=says)


def test_insecure_serves_other_addresses(annd, small):
    port = free_port()
    process = start(annd, small, "--listen", f"0.0.0.0:{port}", "--metrics-listen", "off",
                    "--insecure")
    one = wait_for(f"127.0.0.1:{port}")
    assert one.good("collections/list", {})["data"] == ["c"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_no_data_directory_and_too_little_memory(annd, small, tmp_path):
    annd.fails(3, "serve", "--data", tmp_path / "nothing", "--listen", "127.0.0.1:0",
               "--metrics-listen", "off", says="nothing")
    annd.fails(5, "serve", "--data", small, "--listen", "127.0.0.1:0", "--metrics-listen", "off",
               "--memory", "1M", says="memory")


def test_a_request_under_way_is_answered_before_the_end(annd, site):
    """SIGTERM while searches run: they are answered, new connections are not."""
    server = Server(annd, copy_of(site), "--threads", 1)
    body = json.dumps({"collectionName": "photos", "limit": 100,
                       "data": vectors(site.queries["photos"]) * 100})
    answers = []

    def ask():
        answers.append(Client(server.listen, 60).post("entities/search", body)["code"])

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    began = time.monotonic()
    assert server.stop() == 0
    thread.join()
    assert answers == [0] and time.monotonic() - began < 31


def copy_of(site):
    import shutil
    target = pathlib.Path(site.folder) / "copy"
    if not target.exists():
        shutil.copytree(site.data, target)
    return target
