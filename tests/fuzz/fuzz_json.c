/* Fuzz target of storage/base/json_reader.c. The first byte picks how the rest is read; a text that
 * is accepted must mean the same to every way of reading it, and survive being written again. */
#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "storage/base/json_reader.h"
#include "storage/base/json_writer.h"

/* Copies a text token by token. Returns 0, or -1 when it is refused. */
static int rewrite(const char *text, size_t bytes, struct json_writer *writer)
{
    struct json_reader reader;
    struct json_token token = {0};
    struct error err = ERROR_INIT;
    struct arena arena;
    int rc;

    arena_init(&arena, 1 << 20);
    json_reader_init(&reader, text, bytes, &arena);
    while ((rc = json_next(&reader, &token, &err)) == 0 && token.type != JSON_END) {
        int64_t integer;
        double number;
        float single;

        assert(token.offset <= bytes && token.raw.bytes <= bytes - token.offset);
        switch (token.type) {
        case JSON_BEGIN_OBJECT:
            json_begin_object(writer);
            break;
        case JSON_END_OBJECT:
            json_end_object(writer);
            break;
        case JSON_BEGIN_ARRAY:
            json_begin_array(writer);
            break;
        case JSON_END_ARRAY:
            json_end_array(writer);
            break;
        case JSON_KEY:
            assert(utf8_valid_bytes(token.text.at, token.text.bytes) == token.text.bytes);
            json_key_bytes(writer, token.text.at, token.text.bytes);
            break;
        case JSON_STRING:
            assert(utf8_valid_bytes(token.text.at, token.text.bytes) == token.text.bytes);
            json_string_int64(&token, &integer, NULL);
            json_string_bytes(writer, token.text.at, token.text.bytes);
            break;
        case JSON_NUMBER:
            json_number_float(&token, &single, NULL);
            if (json_number_int64(&token, &integer, NULL) == 0)
                json_int64(writer, integer);
            else if (json_number_double(&token, &number, NULL) == 0)
                json_double(writer, number);
            else
                json_raw(writer, token.raw.at, token.raw.bytes);
            break;
        case JSON_TRUE:
        case JSON_FALSE:
            json_bool(writer, token.type == JSON_TRUE);
            break;
        default:
            json_null(writer);
            break;
        }
    }
    if (rc < 0)
        assert((err.code == ERR_INVALID || err.code == ERR_BUDGET) && err.message[0]);
    arena_release(&arena);
    return rc;
}

static void fuzz_tokens(const char *text, size_t bytes)
{
    struct json_writer first, second;
    struct json_reader reader;
    struct json_span span;
    struct error err = ERROR_INIT;
    const char *once, *twice;
    size_t once_bytes, twice_bytes;
    int rc, skipped;

    json_writer_init(&first, 1 << 24);
    json_writer_init(&second, 1 << 24);
    rc = rewrite(text, bytes, &first);
    json_reader_init(&reader, text, bytes, NULL);
    skipped = json_raw_value(&reader, &span, NULL);
    if (skipped == 0)
        skipped = json_read_end(&reader, NULL);
    if (rc == 0) {
        assert(skipped == 0);
        rc = json_writer_finish(&first, &once, &once_bytes, &err);
        assert(rc == 0);
        /* What we write we read, and it is then written the same. */
        rc = rewrite(once, once_bytes, &second);
        assert(rc == 0);
        rc = json_writer_finish(&second, &twice, &twice_bytes, &err);
        assert(rc == 0);
        assert(once_bytes == twice_bytes && memcmp(once, twice, once_bytes) == 0);
    }
    json_writer_release(&first);
    json_writer_release(&second);
}

static void fuzz_floats(const char *text, size_t bytes)
{
    struct json_reader reader, slow;
    float out[64];
    size_t count = 0;
    int rc;

    json_reader_init(&reader, text, bytes, NULL);
    slow = reader;
    rc = json_read_float_array(&reader, out, 64, &count, NULL);
    assert(count <= 64);
    /* One at a time the numbers are the same, and strtof says so too. */
    int begun = json_array_begin(&slow, NULL);
    assert(rc < 0 || begun == 0);
    for (size_t i = 0; rc == 0 && i < count; i++) {
        char copy[JSON_NUMBER_BYTES_MAX + 1];
        struct json_token token;
        float value, wanted;
        int more = json_array_next(&slow, NULL), read = json_next(&slow, &token, NULL);

        assert(more == 1 && read == 0 && token.raw.bytes < sizeof copy);
        read = json_number_float(&token, &value, NULL);
        assert(read == 0);
        memcpy(copy, token.raw.at, token.raw.bytes);
        copy[token.raw.bytes] = 0;
        wanted = strtof(copy, NULL);
        assert(memcmp(&value, out + i, 4) == 0 && memcmp(&value, &wanted, 4) == 0);
    }
    if (rc == 0) {
        int more = json_array_next(&slow, NULL);
        assert(more == 0 && slow.position == reader.position);
    }
}

static void fuzz_base64(const char *text, size_t bytes)
{
    struct json_span span = {text, bytes};
    struct json_writer writer;
    struct error err = ERROR_INIT;
    uint8_t *out = malloc(bytes + 1);
    const char *again;
    size_t n, again_bytes;

    if (out && json_base64_decode(span, out, bytes, &n, NULL) == 0) {
        json_writer_init(&writer, 2 * bytes + 16);
        json_base64(&writer, out, n);
        int rc = json_writer_finish(&writer, &again, &again_bytes, &err);
        assert(rc == 0);
        /* Only one text stands for these bytes. */
        assert(again_bytes == bytes + 2 && memcmp(again + 1, text, bytes) == 0);
        json_writer_release(&writer);
    }
    free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    const char *text = (const char *)data + 1;

    if (!bytes)
        return 0;
    bytes--;
    switch (data[0] % 4) {
    case 0:
    case 1:
        fuzz_tokens(text, bytes);
        break;
    case 2:
        fuzz_floats(text, bytes);
        break;
    default:
        fuzz_base64(text, bytes);
        break;
    }
    return 0;
}
