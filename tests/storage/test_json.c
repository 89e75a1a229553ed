/* Checks storage/base/json_reader.c and json_writer.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <inttypes.h>
#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/base/bytes.h"
#include "storage/base/json_reader.h"
#include "storage/base/json_writer.h"
#include "storage/base/random.h"

#define SEED 20260u

/* Reads the text token by token to its end from an exact-size copy, so that a sanitizer sees a read
 * past it. Returns 0 or -1 with err. */
static int read_all(const char *text, size_t bytes, struct error *err)
{
    struct json_reader reader;
    struct json_token token;
    struct arena arena;
    char *copy = malloc(bytes ? bytes : 1);
    int rc;

    assert_non_null(copy);
    memcpy(copy, text, bytes);
    arena_init(&arena, 1 << 20);
    json_reader_init(&reader, copy, bytes, &arena);
    do
        rc = json_next(&reader, &token, err);
    while (rc == 0 && token.type != JSON_END);
    arena_release(&arena);
    free(copy);
    return rc;
}

static void expect_accepted(const char *text, size_t bytes)
{
    struct error err = ERROR_INIT;

    if (read_all(text, bytes, &err) < 0)
        fail_msg("refused %s: %s", text, err.message);
}

static void expect_refused(const char *text, size_t bytes, const char *message)
{
    struct error err = ERROR_INIT;

    if (read_all(text, bytes, &err) == 0)
        fail_msg("accepted %s", text);
    assert_int_equal(err.code, ERR_INVALID);
    if (!strstr(err.message, message))
        fail_msg("for %s wanted \"%s\", found \"%s\"", text, message, err.message);
}

static void test_well_formed_texts_are_accepted(void **state)
{
    static const char *const texts[] = {
        "0",
        "-0",
        "1.5e+10",
        "1E-2",
        " [ ] ",
        "{}",
        "\"\"",
        "true",
        "false",
        "null",
        "[1,2,[3],{\"a\":[]}]",
        "{\"a\":1,\"b\":{\"c\":null}}\n",
        "\"\\u00e9\\ud83d\\ude00\\n\\/\"",
        "\"\xc3\xa9 \xed\x9f\xbf \xee\x80\x80 \xf0\x90\x80\x80 \xf4\x8f\xbf\xbf\x7f\"",
        "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]", /* 32 levels */
    };

    (void)state;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        expect_accepted(texts[i], strlen(texts[i]));
}

static void test_malformed_texts_are_refused_with_their_position(void **state)
{
    static const struct {
        const char *text, *message;
    } cases[] = {
        {"", "at byte 0"},
        {"  ", "the text ends where a value belongs, at byte 2"},
        {"1 2", "found '2' where the end of the text belongs, at byte 2"},
        {"{} x", "at byte 3"},
        {"[1,]", "found ']' where a value belongs, at byte 3"},
        {"[,1]", "at byte 1"},
        {"[1 2]", "found '2' where ',' or ']' belongs, at byte 3"},
        {"[1}", "at byte 2"},
        {"{\"a\":1]", "at byte 6"},
        {"{\"a\":1,}", "found '}' where a key in quotes belongs, at byte 7"},
        {"{\"a\"}", "found '}' where ':' belongs, at byte 4"},
        {"{\"a\":}", "at byte 5"},
        {"{a:1}", "at byte 1"},
        {"{1:1}", "at byte 1"},
        {"{,}", "at byte 1"},
        {"[", "at byte 1"},
        {"{\"a\":[1", "at byte 7"},
        {"]", "at byte 0"},
        {"}", "at byte 0"},
        {":", "at byte 0"},
        {"01", "at byte 1"},
        {"-", "the text ends where a digit belongs, at byte 1"},
        {"-x", "found 'x' where a digit belongs, at byte 1"},
        {"+1", "at byte 0"},
        {".5", "at byte 0"},
        {"1.", "the text ends where a digit belongs, at byte 2"},
        {"1.e5", "at byte 2"},
        {"1e", "at byte 2"},
        {"1e+", "at byte 3"},
        {"0x10", "at byte 1"},
        {"NaN", "at byte 0"},
        {"Infinity", "at byte 0"},
        {"-Infinity", "at byte 1"},
        {"nul", "at byte 0"},
        {"nulll", "at byte 4"},
        {"True", "at byte 0"},
        {"'a'", "at byte 0"},
        {"\"abc", "the text ends inside a string, at byte 4"},
        {"\"a\nb\"", "a control character inside a string at byte 2"},
        {"\"a\tb\"", "at byte 2"},
        {"\"\\x\"", "an escape that JSON does not have at byte 1"},
        {"\"\\u12g4\"", "at byte 1"},
        {"\"\\u123", "at byte 1"},
        {"\"\\u0000\"", "U+0000 is not accepted, at byte 1"},
        {"\"\\ud800\"", "an unpaired surrogate at byte 1"},
        {"\"\\ud800x\"", "an unpaired surrogate at byte 1"},
        {"\"\\ud800\\u0041\"", "an unpaired surrogate at byte 1"},
        {"\"\\udc00\"", "an unpaired surrogate at byte 1"},
        {"\"\\ud800\\ud800\"", "an unpaired surrogate at byte 1"},
        {"\"\\", "at byte 1"},
        {"\"\x80\"", "not UTF-8 inside a string at byte 1"},
        {"\"\xc0\xaf\"", "at byte 1"},
        {"\"\xe0\x80\x80\"", "at byte 1"},
        {"\"\xed\xa0\x80\"", "at byte 1"},
        {"\"\xf4\x90\x80\x80\"", "at byte 1"},
        {"\"\xf5\x80\x80\x80\"", "at byte 1"},
        {"\"abcdefgh\xe2\x82\"", "at byte 9"},
        {"\"\xe2\x82", "at byte 1"},
        {"\xef\xbb\xbf{}", "found byte 0xef where a value belongs, at byte 0"},
        {"{\"a\":1 /* c */}", "at byte 7"},
        /* 33 levels */
        {"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", "nested deeper than 32 levels at byte 32"},
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        expect_refused(cases[i].text, strlen(cases[i].text), cases[i].message);
    expect_refused("\"a\0b\"", 5, "a control character inside a string at byte 2");
    expect_refused("1\0", 2, "found byte 0x00");
}

static void test_every_prefix_of_a_text_is_refused(void **state)
{
    static const char text[] = "{\"key\\n\":[1.5e3,-2,true,false,null,\"\xc3\xa9\\ud83d\\ude00\"],"
                               "\"b\":{\"c\":{}}}";

    (void)state;
    for (size_t n = 0; n < sizeof text - 1; n++) {
        struct error err = ERROR_INIT;

        if (read_all(text, n, &err) == 0)
            fail_msg("accepted the first %zu bytes", n);
        assert_int_equal(err.code, ERR_INVALID);
    }
    expect_accepted(text, sizeof text - 1);
}

static void test_tokens_come_in_order_with_their_spans(void **state)
{
    static const char text[] = " {\"a\\u0062\" : [ 12 , \"x\\ty\" ] } ";
    static const enum json_type types[] = {JSON_BEGIN_OBJECT, JSON_KEY,    JSON_BEGIN_ARRAY,
                                           JSON_NUMBER,       JSON_STRING, JSON_END_ARRAY,
                                           JSON_END_OBJECT,   JSON_END,    JSON_END};
    static const char *const raws[] = {"{", "\"a\\u0062\"", "[", "12", "\"x\\ty\"", "]", "}", "",
                                       ""};
    struct error err = ERROR_INIT;
    struct json_reader reader;
    struct json_token token;
    struct arena arena;

    (void)state;
    arena_init(&arena, 1 << 16);
    json_reader_init(&reader, text, sizeof text - 1, &arena);
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        enum json_type peeked;

        assert_int_equal(json_peek(&reader, &peeked, &err), 0);
        assert_int_equal(peeked, types[i]);
        assert_int_equal(json_next(&reader, &token, &err), 0);
        assert_int_equal(token.type, types[i]);
        assert_true(json_span_is(token.raw, raws[i]));
        if (token.raw.bytes)
            assert_ptr_equal(token.raw.at, text + token.offset);
        if (token.type == JSON_KEY)
            assert_true(json_span_is(token.text, "ab"));
        if (token.type == JSON_STRING)
            assert_true(json_span_is(token.text, "x\ty"));
    }
    arena_release(&arena);
}

static void test_escapes_decode_to_utf8(void **state)
{
    static const char text[] = "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u0041\\u00e9\\u20AC\\uD83D\\uDE00\"";
    struct error err = ERROR_INIT;
    struct json_reader reader;
    struct json_span span;
    struct arena arena;

    (void)state;
    arena_init(&arena, 1 << 16);
    json_reader_init(&reader, text, sizeof text - 1, &arena);
    assert_int_equal(json_read_string(&reader, &span, &err), 0);
    assert_true(json_span_is(span, "\"\\/\b\f\n\r\tA\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80"));
    arena_release(&arena);
}

static void test_many_escaped_strings_share_chunks_and_a_full_arena_is_err_budget(void **state)
{
    struct error err = ERROR_INIT;
    struct json_reader reader;
    struct json_span span;
    struct arena arena;
    char text[8 * 2000 + 2];
    size_t n = 0;
    int more;

    (void)state;
    text[n++] = '[';
    for (int i = 0; i < 2000; i++)
        n += (size_t)sprintf(text + n, "%s\"\\n%02d\"", i ? "," : "", i % 100);
    text[n++] = ']';

    arena_init(&arena, 32768); /* 2000 grants of 64 bytes would be 128000 */
    json_reader_init(&reader, text, n, &arena);
    assert_int_equal(json_array_begin(&reader, &err), 0);
    for (int i = 0; (more = json_array_next(&reader, &err)) > 0; i++) {
        char want[8];

        assert_int_equal(json_read_string(&reader, &span, &err), 0);
        sprintf(want, "\n%02d", i % 100);
        assert_true(json_span_is(span, want));
    }
    assert_int_equal(more, 0);
    arena_release(&arena);

    arena_init(&arena, 64);
    json_reader_init(&reader, text, n, &arena);
    assert_int_equal(json_array_begin(&reader, &err), 0);
    do
        more = json_array_next(&reader, &err) > 0 ? json_read_string(&reader, &span, &err) : -1;
    while (more == 0);
    assert_int_equal(err.code, ERR_BUDGET);
    arena_release(&arena);

    error_clear(&err);
    json_reader_init(&reader, "\"\\n\"", 4, NULL);
    assert_int_equal(json_read_string(&reader, &span, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
}

static int read_int64(const char *text, int64_t *out, struct error *err)
{
    struct json_reader reader;

    json_reader_init(&reader, text, strlen(text), NULL);
    if (json_read_int64(&reader, out, err) < 0)
        return -1;
    return json_read_end(&reader, err);
}

static void test_int64_is_exact_or_refused(void **state)
{
    static const struct {
        const char *text;
        int64_t value;
    } good[] = {{"0", 0},
                {"7", 7},
                {"-1", -1},
                {"9007199254740993", 9007199254740993},
                {"9223372036854775807", INT64_MAX},
                {"-9223372036854775808", INT64_MIN},
                {"\"9223372036854775807\"", INT64_MAX},
                {"\"-9223372036854775808\"", INT64_MIN},
                {"\"0\"", 0}};
    static const char *const bad[] = {"-0",
                                      "1.0",
                                      "1e3",
                                      "0.0",
                                      "9223372036854775808",
                                      "-9223372036854775809",
                                      "18446744073709551617",
                                      "99999999999999999999999999999",
                                      "100000000000000000000",
                                      "\"\"",
                                      "\"-\"",
                                      "\"-0\"",
                                      "\"007\"",
                                      "\"+1\"",
                                      "\" 1\"",
                                      "\"1 \"",
                                      "\"1.0\"",
                                      "\"0x1\"",
                                      "\"1e1\"",
                                      "\"9223372036854775808\"",
                                      "true",
                                      "null",
                                      "[]"};

    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        struct error err = ERROR_INIT;
        int64_t value = 1;

        if (read_int64(good[i].text, &value, &err) < 0)
            fail_msg("%s: %s", good[i].text, err.message);
        assert_true(value == good[i].value);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct error err = ERROR_INIT;
        int64_t value;

        if (read_int64(bad[i], &value, &err) == 0)
            fail_msg("%s was read as %" PRId64, bad[i], value);
        assert_int_equal(err.code, ERR_INVALID);
        assert_non_null(strstr(err.message, "at byte 0"));
    }
}

static float read_float(const char *text)
{
    struct error err = ERROR_INIT;
    struct json_reader reader;
    char array[1200];
    size_t count = 0;
    float value = NAN;

    snprintf(array, sizeof array, "[%s]", text);
    json_reader_init(&reader, array, strlen(array), NULL);
    if (json_read_float_array(&reader, &value, 1, &count, &err) < 0)
        fail_msg("%s: %s", array, err.message);
    assert_int_equal(json_read_end(&reader, &err), 0);
    assert_int_equal(count, 1);
    return value;
}

static uint32_t float_bits(float value)
{
    uint32_t bits;

    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static void test_hard_floats_are_rounded_once(void **state)
{
    static const struct {
        const char *text;
        float value;
    } cases[] = {
        {"0", 0.0f},
        {"-0", -0.0f},
        {"0e99999999999", 0.0f},
        {"1", 1.0f},
        {"16777217", 16777216.0f}, /* half way: to even */
        {"16777217.0000000000000000000000000000001", 16777218.0f},
        {"16777216.9999999999999999999999999999999", 16777216.0f},
        {"16777219", 16777220.0f},
        /* rounding to double and then to float would give 1 */
        {"1.00000005960464477540", 0x1.000002p0f},
        {"1.000000059604644775390625", 1.0f},
        {"1.000000059604644775390626", 0x1.000002p0f},
        {"3.4028234663852886e38", 0x1.fffffep127f},
        {"3.4028235677973362e38", 0x1.fffffep127f},
        {"1.17549435e-38", 0x1p-126f},
        {"1.4e-45", 0x1p-149f},
        {"7.0064923216240853546186479164495e-46", 0.0f},
        {"7.0064923216240853546186479164496e-46", 0x1p-149f},
        {"1e-400", 0.0f},
        {"-1e-400", -0.0f},
        {"0.12345679104328156", 0.12345679f},
        {"1234567890123456789012345678901234567e-36", 1.23456789f},
        {"0.000000000000000000000000000000000000000000000000000001e54", 1.0f},
    };
    char text[1100];

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float value = read_float(cases[i].text);

        if (float_bits(value) != float_bits(cases[i].value))
            fail_msg("%s was read as %a, wanted %a", cases[i].text, (double)value,
                     (double)cases[i].value);
    }
    memset(text, '0', sizeof text);
    text[1] = '.';
    strcpy(text + 900, "5e897"); /* 0.(898 zeros)5 */
    assert_int_equal(float_bits(read_float(text)), float_bits(0.05f));
}

static void test_numbers_that_no_float_holds_are_refused(void **state)
{
    static const char *const bad[] = {"[1e39]",
                                      "[-1e39]",
                                      "[1e999]",
                                      "[3.4028235677973367e38]",
                                      "[NaN]",
                                      "[nan]",
                                      "[Infinity]",
                                      "[-Infinity]",
                                      "[1,]",
                                      "[,1]",
                                      "[1 2]",
                                      "[1",
                                      "[",
                                      "[\"1\"]",
                                      "[null]",
                                      "[[1]]",
                                      "[01]",
                                      "[1.]",
                                      "[-]",
                                      "[+1]",
                                      "{\"a\":1}",
                                      "1",
                                      "[1,2,3,4,5]",
                                      "[1]]",
                                      "[340282356779733661637539395458142568448]"};
    struct error err = ERROR_INIT;
    struct json_reader reader;
    char text[1200];
    size_t count;
    float out[4];

    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        error_clear(&err);
        json_reader_init(&reader, bad[i], strlen(bad[i]), NULL);
        if (json_read_float_array(&reader, out, 4, &count, &err) == 0 &&
            json_read_end(&reader, &err) == 0)
            fail_msg("%s was accepted", bad[i]);
        assert_int_equal(err.code, ERR_INVALID);
        if (!strstr(err.message, "at byte"))
            fail_msg("%s: no position in \"%s\"", bad[i], err.message);
    }
    text[0] = '[';
    memset(text + 1, '1', 1025);
    strcpy(text + 1026, "]");
    error_clear(&err);
    json_reader_init(&reader, text, strlen(text), NULL);
    assert_int_equal(json_read_float_array(&reader, out, 4, &count, &err), -1);
    assert_string_equal(err.message, "a number of more than 1024 characters at byte 1");

    error_clear(&err);
    json_reader_init(&reader, "[ ]", 3, NULL);
    assert_int_equal(json_read_float_array(&reader, out, 0, &count, &err), 0);
    assert_int_equal(count, 0);
    assert_int_equal(json_read_end(&reader, &err), 0);
}

/* Compares the quick path with strtof over texts of every length and magnitude. */
static void test_floats_agree_with_strtof_on_random_decimals(void **state)
{
    struct random random;

    (void)state;
    random_init(&random, SEED, 1);
    for (int i = 0; i < 400000; i++) {
        char text[64];
        size_t n = 0, digits = 1 + random_below(&random, 24), point = random_below(&random, 25);

        if (random_below(&random, 2))
            text[n++] = '-';
        text[n++] = (char)('1' + random_below(&random, 9));
        for (size_t d = 1; d < digits; d++) {
            if (d == point)
                text[n++] = '.';
            text[n++] = (char)('0' + random_below(&random, 10));
        }
        n += (size_t)sprintf(text + n, "e%d", (int)random_below(&random, 60) - 48);
        float want = strtof(text, NULL);
        if (isinf(want))
            continue;
        float found = read_float(text);
        if (float_bits(found) != float_bits(want))
            fail_msg("seed %u: %s was read as %a, wanted %a", SEED, text, (double)found,
                     (double)want);
    }
}

/* Decimals next to the middle between two floats, where a second rounding would show. */
static void test_floats_agree_with_strtof_near_the_middles(void **state)
{
    struct random random;

    (void)state;
    random_init(&random, SEED, 2);
    for (int i = 0; i < 100000; i++) {
        uint32_t bits = (uint32_t)(random_below(&random, 0x7e000000) + 0x00800000);
        double low, high;
        char text[64];
        float a, b;

        memcpy(&a, &bits, 4);
        bits++;
        memcpy(&b, &bits, 4);
        low = a;
        high = b;
        snprintf(text, sizeof text, "%.*e", (int)random_below(&random, 22), (low + high) / 2);
        float want = strtof(text, NULL);
        if (isinf(want))
            continue;
        float found = read_float(text);
        if (float_bits(found) != float_bits(want))
            fail_msg("seed %u: %s was read as %a, wanted %a", SEED, text, (double)found,
                     (double)want);
    }
}

static void test_a_million_random_floats_survive_writer_and_reader(void **state)
{
    enum { BATCH = 1000, BATCHES = 1000 };
    static float in[BATCH], out[BATCH];
    struct error err = ERROR_INIT;
    struct json_writer writer;
    struct random random;

    (void)state;
    random_init(&random, SEED, 3);
    json_writer_init(&writer, 1 << 20);
    for (int batch = 0; batch < BATCHES; batch++) {
        struct json_reader reader;
        const char *text;
        size_t bytes, count;

        for (int i = 0; i < BATCH; i++) {
            uint32_t bits;

            do
                bits = (uint32_t)random_u64(&random);
            while ((bits & 0x7f800000) == 0x7f800000);
            memcpy(in + i, &bits, 4);
        }
        json_writer_reset(&writer);
        json_float_array(&writer, in, BATCH);
        assert_int_equal(json_writer_finish(&writer, &text, &bytes, &err), 0);
        json_reader_init(&reader, text, bytes, NULL);
        if (json_read_float_array(&reader, out, BATCH, &count, &err) < 0)
            fail_msg("seed %u: %s", SEED, err.message);
        assert_int_equal(count, BATCH);
        for (int i = 0; i < BATCH; i++)
            if (float_bits(in[i]) != float_bits(out[i]))
                fail_msg("seed %u: %a came back as %a", SEED, (double)in[i], (double)out[i]);
    }
    json_writer_release(&writer);
}

/* The fewest digits: no text with one digit less reads back. */
static void test_float_texts_have_the_fewest_digits(void **state)
{
    struct random random;
    int longer = 0;

    (void)state;
    random_init(&random, SEED, 4);
    for (int i = 0; i < 100000; i++) {
        char text[JSON_FLOAT_TEXT_BYTES], shorter[40];
        uint32_t bits = (uint32_t)random_below(&random, 0x7f800000);
        size_t digits = 0;
        float value;

        memcpy(&value, &bits, 4);
        if (value < 16777216.0f && value == floorf(value))
            continue;
        size_t n = json_format_float(value, text);
        assert_int_equal(n, strlen(text));
        assert_true(strtof(text, NULL) == value);
        for (const char *p = text; *p && *p != 'e'; p++)
            if (*p >= '0' && *p <= '9' && (digits || *p != '0'))
                digits++;
        for (const char *p = text + n - 1; !strpbrk(text, ".e") && p > text && *p == '0'; p--)
            digits--;
        if (digits < 2)
            continue;
        snprintf(shorter, sizeof shorter, "%.*e", (int)digits - 2, (double)value);
        longer += strtof(shorter, NULL) == value;
    }
    assert_int_equal(longer, 0);
}

static void test_numbers_print_as_people_write_them(void **state)
{
    static const struct {
        float value;
        const char *text;
    } floats[] = {{0.0f, "0"},
                  {-0.0f, "-0.0"},
                  {1.0f, "1"},
                  {-1.5f, "-1.5"},
                  {0.1f, "0.1"},
                  {0.001f, "0.001"},
                  {1e-7f, "1e-7"},
                  {16777216.0f, "16777216"},
                  {3.4028235e38f, "3.4028235e38"},
                  {1e-45f, "1e-45"},
                  {123456.79f, "123456.79"},
                  {255.0f, "255"},
                  {1e20f, "1e20"},
                  {0.99999994f, "0.99999994"}};
    static const struct {
        double value;
        const char *text;
    } doubles[] = {{0.1, "0.1"},
                   {1.0 / 3, "0.3333333333333333"},
                   {1e300, "1e300"},
                   {5e-324, "5e-324"},
                   {9007199254740991.0, "9007199254740991"},
                   {-2.5, "-2.5"},
                   {0.30000000000000004, "0.30000000000000004"},
                   {1.7976931348623157e308, "1.7976931348623157e308"}};
    char text[JSON_FLOAT_TEXT_BYTES];

    (void)state;
    for (size_t i = 0; i < sizeof floats / sizeof *floats; i++) {
        json_format_float(floats[i].value, text);
        assert_string_equal(text, floats[i].text);
    }
    for (size_t i = 0; i < sizeof doubles / sizeof *doubles; i++) {
        json_format_double(doubles[i].value, text);
        assert_string_equal(text, doubles[i].text);
    }
}

static void test_random_doubles_survive_writer_and_reader(void **state)
{
    struct random random;

    (void)state;
    random_init(&random, SEED, 5);
    for (int i = 0; i < 100000; i++) {
        uint64_t bits = random_u64(&random);
        struct error err = ERROR_INIT;
        char text[JSON_FLOAT_TEXT_BYTES];
        struct json_reader reader;
        double value, back;

        memcpy(&value, &bits, 8);
        if (!isfinite(value))
            continue;
        json_reader_init(&reader, text, json_format_double(value, text), NULL);
        assert_int_equal(json_read_double(&reader, &back, &err), 0);
        if (memcmp(&back, &value, 8) != 0)
            fail_msg("seed %u: %a came back as %a", SEED, value, back);
    }
}

static void test_the_locale_changes_nothing(void **state)
{
    static const char *const names[] = {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "de_DE"};
    char text[JSON_FLOAT_TEXT_BYTES];
    bool found = false;

    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof *names && !found; i++)
        found = setlocale(LC_ALL, names[i]) != NULL;
    if (!found)
        skip(); /* no locale with a decimal comma is installed */
    json_format_double(0.3, text);
    assert_string_equal(text, "0.3");
    json_format_float(1e-45f, text);
    assert_string_equal(text, "1e-45");
    json_format_float(1.5e-39f, text);
    assert_true(read_float(text) == 1.5e-39f);
    assert_true(read_float("1.000000059604644775390626") == 0x1.000002p0f);
    setlocale(LC_ALL, "C");
}

static void test_raw_values_and_skips_take_one_whole_value(void **state)
{
    static const char text[] = "{\"a\": {\"x\":[1,\"\\n]\",{}]} ,\"b\":[ ],\"c\":-1.50,\"d\":1}";
    struct error err = ERROR_INIT;
    struct json_reader reader;
    struct json_span key, span;

    (void)state;
    json_reader_init(&reader, text, sizeof text - 1, NULL);
    assert_int_equal(json_object_begin(&reader, &err), 0);
    assert_int_equal(json_object_next(&reader, &key, &err), 1);
    assert_int_equal(json_raw_value(&reader, &span, &err), 0);
    assert_true(json_span_is(span, "{\"x\":[1,\"\\n]\",{}]}"));
    assert_int_equal(json_object_next(&reader, &key, &err), 1);
    assert_true(json_span_is(key, "b"));
    assert_int_equal(json_skip_value(&reader, &err), 0);
    assert_int_equal(json_object_next(&reader, &key, &err), 1);
    assert_int_equal(json_raw_value(&reader, &span, &err), 0);
    assert_true(json_span_is(span, "-1.50")); /* the text, not a number near it */
    assert_int_equal(json_object_next(&reader, &key, &err), 1);
    assert_false(json_read_null(&reader));
    assert_int_equal(json_skip_value(&reader, &err), 0);
    assert_int_equal(json_object_next(&reader, &key, &err), 0);
    assert_int_equal(json_read_end(&reader, &err), 0);

    json_reader_init(&reader, "[]", 2, NULL);
    assert_int_equal(json_array_begin(&reader, &err), 0);
    assert_int_equal(json_raw_value(&reader, &span, &err), -1);

    error_clear(&err);
    json_reader_init(&reader, "[{\"a\":[1}]", 10, NULL);
    assert_int_equal(json_skip_value(&reader, &err), -1);
    assert_non_null(strstr(err.message, "at byte 8"));
}

static void test_typed_reads_refuse_other_types_and_stay_failed(void **state)
{
    struct error err = ERROR_INIT;
    struct json_reader reader;
    struct json_span span;
    double number;
    bool flag;

    (void)state;
    json_reader_init(&reader, "[1]", 3, NULL);
    assert_int_equal(json_read_string(&reader, &span, &err), -1);
    assert_string_equal(err.message, "found an array where a string belongs, at byte 0");
    assert_int_equal(json_array_next(&reader, NULL), -1);
    assert_int_equal(json_skip_value(&reader, NULL), -1);

    error_clear(&err);
    json_reader_init(&reader, "[1e400, true, null]", 19, NULL);
    assert_int_equal(json_array_begin(&reader, &err), 0);
    struct json_reader copy = reader;
    assert_int_equal(json_read_double(&copy, &number, &err), -1);
    assert_string_equal(err.message, "the number 1e400 is beyond the range of double, at byte 1");
    error_clear(&err);
    assert_int_equal(json_skip_value(&reader, &err), 0);
    assert_int_equal(json_array_next(&reader, &err), 1);
    assert_int_equal(json_read_bool(&reader, &flag, &err), 0);
    assert_true(flag);
    assert_int_equal(json_array_next(&reader, &err), 1);
    assert_true(json_read_null(&reader));
    assert_int_equal(json_array_next(&reader, &err), 0);
    assert_int_equal(json_read_end(&reader, &err), 0);
}

static void test_the_writer_places_commas_and_escapes(void **state)
{
    struct error err = ERROR_INIT;
    struct json_writer writer;
    const char *text;
    size_t bytes;

    (void)state;
    json_writer_init(&writer, 4096);
    json_begin_object(&writer);
    json_key(&writer, "min");
    json_int64(&writer, INT64_MIN);
    json_key(&writer, "max");
    json_uint64(&writer, UINT64_MAX);
    json_key(&writer, "list");
    json_begin_array(&writer);
    json_begin_array(&writer);
    json_end_array(&writer);
    json_begin_object(&writer);
    json_end_object(&writer);
    json_bool(&writer, true);
    json_bool(&writer, false);
    json_null(&writer);
    json_int64_string(&writer, INT64_MAX);
    json_float(&writer, 0.5f);
    json_double(&writer, 0.25);
    json_raw(&writer, "{\"r\":1}", 7);
    json_base64(&writer, "\x01\x02\x03\xff", 4);
    json_end_array(&writer);
    json_key(&writer, "quote\"");
    json_string(&writer, "a\\\n\x01\x7f/\xc3\xa9");
    json_key(&writer, "bad");
    json_string_bytes(&writer, "a\xff\xc3", 3);
    json_end_object(&writer);
    assert_int_equal(json_writer_finish(&writer, &text, &bytes, &err), 0);
    assert_string_equal(
        text, "{\"min\":-9223372036854775808,\"max\":18446744073709551615,\"list\":[[],{},true,"
              "false,null,\"9223372036854775807\",0.5,0.25,{\"r\":1},\"AQID/w==\"],"
              "\"quote\\\"\":\"a\\\\\\n\\u0001\x7f/\xc3\xa9\","
              "\"bad\":\"a\xef\xbf\xbd\xef\xbf\xbd\"}");
    assert_int_equal(bytes, strlen(text));
    expect_accepted(text, bytes);

    char *taken;
    assert_int_equal(json_writer_take(&writer, &taken, &bytes, &err), 0);
    expect_accepted(taken, bytes);
    free(taken);
    json_null(&writer);
    assert_int_equal(json_writer_finish(&writer, &text, &bytes, &err), 0);
    assert_string_equal(text, "null");
    json_writer_release(&writer);
}

static void test_the_writer_stops_at_its_cap(void **state)
{
    struct error err = ERROR_INIT;
    struct json_writer writer;
    const char *text;
    size_t bytes;

    (void)state;
    json_writer_init(&writer, 10);
    json_string_bytes(&writer, "12345678", 8);
    assert_int_equal(json_writer_finish(&writer, &text, &bytes, &err), 0);
    assert_int_equal(bytes, 10);
    json_writer_reset(&writer);
    json_string_bytes(&writer, "123456789", 9);
    assert_true(json_writer_failed(&writer));
    assert_int_equal(json_writer_finish(&writer, &text, &bytes, &err), -1);
    assert_int_equal(err.code, ERR_BUDGET);
    json_writer_reset(&writer);
    error_clear(&err);
    json_base64(&writer, "1234567", 7);
    assert_int_equal(json_writer_finish(&writer, &text, &bytes, &err), -1);
    assert_int_equal(err.code, ERR_BUDGET);
    json_writer_reset(&writer);
    error_clear(&err);
    json_base64(&writer, "123456", 6);
    assert_int_equal(json_writer_finish(&writer, &text, &bytes, &err), 0);
    json_writer_release(&writer);

    json_writer_init(&writer, 1 << 20);
    json_begin_array(&writer);
    for (int i = 0; i < 2000000; i++)
        json_int64(&writer, i);
    json_end_array(&writer);
    error_clear(&err);
    assert_int_equal(json_writer_finish(&writer, &text, &bytes, &err), -1);
    assert_int_equal(err.code, ERR_BUDGET);
    assert_true(writer.capacity <= (1 << 20) + 1);
    json_writer_release(&writer);
}

static void test_the_writer_refuses_what_is_no_json(void **state)
{
    struct error err = ERROR_INIT;
    struct json_writer w;
    const char *text;
    size_t bytes;

    (void)state;
    json_writer_init(&w, 4096);
    json_float(&w, NAN);
    assert_int_equal(json_writer_finish(&w, &text, &bytes, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);

    for (int i = 0; i < 7; i++) {
        json_writer_reset(&w);
        error_clear(&err);
        switch (i) {
        case 0:
            break; /* nothing written */
        case 1:
            json_begin_object(&w);
            break;
        case 2:
            json_begin_object(&w);
            json_null(&w);
            json_end_object(&w);
            break;
        case 3:
            json_begin_object(&w);
            json_key(&w, "a");
            json_end_object(&w);
            break;
        case 4:
            json_null(&w);
            json_null(&w);
            break;
        case 5:
            json_begin_array(&w);
            json_end_object(&w);
            break;
        case 6:
            json_begin_array(&w);
            json_key(&w, "a");
            json_end_array(&w);
            break;
        }
        assert_int_equal(json_writer_finish(&w, &text, &bytes, &err), -1);
        assert_int_equal(err.code, ERR_INTERNAL);
    }
    json_writer_release(&w);
}

static void test_base64_survives_and_strays_are_refused(void **state)
{
    static const char *const bad[] = {"A",        "AB",   "ABC",  "A===", "====", "AB=C",
                                      "AB==AB==", "A*==", "AA= ", "AB==", "AAB=", "\nAAA"};
    struct error err = ERROR_INIT;
    struct json_writer writer;
    struct random random;
    uint8_t in[64], out[64];
    size_t bytes, decoded;
    const char *text;

    (void)state;
    random_init(&random, SEED, 6);
    json_writer_init(&writer, 4096);
    for (size_t n = 0; n <= sizeof in; n++) {
        for (size_t i = 0; i < n; i++)
            in[i] = (uint8_t)random_u64(&random);
        json_writer_reset(&writer);
        json_base64(&writer, in, n);
        assert_int_equal(json_writer_finish(&writer, &text, &bytes, &err), 0);
        struct json_span span = {text + 1, bytes - 2};
        assert_int_equal(json_base64_decode(span, out, n, &decoded, &err), 0);
        assert_int_equal(decoded, n);
        assert_memory_equal(in, out, n);
        if (n) {
            assert_int_equal(json_base64_decode(span, out, n - 1, &decoded, &err), -1);
            error_clear(&err);
        }
    }
    json_writer_release(&writer);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct json_span span = {bad[i], strlen(bad[i])};

        error_clear(&err);
        if (json_base64_decode(span, out, sizeof out, &decoded, &err) == 0)
            fail_msg("%s was accepted", bad[i]);
        assert_int_equal(err.code, ERR_INVALID);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_well_formed_texts_are_accepted),
        cmocka_unit_test(test_malformed_texts_are_refused_with_their_position),
        cmocka_unit_test(test_every_prefix_of_a_text_is_refused),
        cmocka_unit_test(test_tokens_come_in_order_with_their_spans),
        cmocka_unit_test(test_escapes_decode_to_utf8),
        cmocka_unit_test(test_many_escaped_strings_share_chunks_and_a_full_arena_is_err_budget),
        cmocka_unit_test(test_int64_is_exact_or_refused),
        cmocka_unit_test(test_hard_floats_are_rounded_once),
        cmocka_unit_test(test_numbers_that_no_float_holds_are_refused),
        cmocka_unit_test(test_floats_agree_with_strtof_on_random_decimals),
        cmocka_unit_test(test_floats_agree_with_strtof_near_the_middles),
        cmocka_unit_test(test_a_million_random_floats_survive_writer_and_reader),
        cmocka_unit_test(test_float_texts_have_the_fewest_digits),
        cmocka_unit_test(test_numbers_print_as_people_write_them),
        cmocka_unit_test(test_random_doubles_survive_writer_and_reader),
        cmocka_unit_test(test_the_locale_changes_nothing),
        cmocka_unit_test(test_raw_values_and_skips_take_one_whole_value),
        cmocka_unit_test(test_typed_reads_refuse_other_types_and_stay_failed),
        cmocka_unit_test(test_the_writer_places_commas_and_escapes),
        cmocka_unit_test(test_the_writer_stops_at_its_cap),
        cmocka_unit_test(test_the_writer_refuses_what_is_no_json),
        cmocka_unit_test(test_base64_survives_and_strays_are_refused),
    };

    return cmocka_run_group_tests_name("json", tests, NULL, NULL);
}
