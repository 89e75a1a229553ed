/* How it works: every value goes through open_value(), which writes the comma and checks that a
 * value may stand here, and close_value(). Numbers are turned into (decimal digits, power of ten)
 * and laid out by render(); for a float32 the digits come from double arithmetic, tried with 6 to
 * 9 digits against the interval that rounds to it; where that arithmetic cannot tell, and for every
 * double that is no whole number, printf and strtod decide. */
#include "storage/base/json_writer.h"

#include <assert.h>
#include <float.h>
#include <inttypes.h>
#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/base/bytes.h"
#include "storage/base/json_reader.h"

/* ---- the buffer ---- */

void json_writer_init(struct json_writer *writer, size_t bytes_max)
{
    *writer = (struct json_writer){.bytes_max = bytes_max};
}

void json_writer_release(struct json_writer *writer)
{
    free(writer->text);
    *writer = (struct json_writer){.bytes_max = writer->bytes_max};
}

void json_writer_reset(struct json_writer *writer)
{
    *writer = (struct json_writer){
        .text = writer->text, .capacity = writer->capacity, .bytes_max = writer->bytes_max};
}

bool json_writer_failed(const struct json_writer *writer)
{
    return writer->code != ERR_NONE;
}

static void fail(struct json_writer *w, enum error_code code, const char *problem)
{
    if (w->code)
        return;
    w->code = code;
    w->problem = problem;
}

/* Room for `bytes` more and a NUL, or NULL with the failure noted. */
static char *reserve(struct json_writer *w, size_t bytes)
{
    size_t capacity;
    char *text;

    if (w->code)
        return NULL;
    if (bytes > w->bytes_max - w->bytes) {
        fail(w, ERR_BUDGET, "the answer would be larger than its limit");
        return NULL;
    }
    if (w->bytes + bytes < w->capacity)
        return w->text + w->bytes;
    capacity = w->capacity < 256 ? 256 : w->capacity;
    while (capacity <= w->bytes + bytes)
        capacity *= 2;
    if (capacity > w->bytes_max)
        capacity = w->bytes_max + 1; /* the cap is on the text, the NUL is ours */
    text = realloc(w->text, capacity);
    if (!text) {
        fail(w, ERR_NOMEM, "no memory for the answer");
        return NULL;
    }
    w->text = text;
    w->capacity = capacity;
    return text + w->bytes;
}

static void put(struct json_writer *w, const char *text, size_t bytes)
{
    char *at = reserve(w, bytes);

    if (!at)
        return;
    memcpy(at, text, bytes);
    w->bytes += bytes;
}

static void put_char(struct json_writer *w, char c)
{
    put(w, &c, 1);
}

/* ---- structure ---- */

static bool in_object(const struct json_writer *w)
{
    return w->depth && (w->objects >> (w->depth - 1) & 1);
}

static void open_value(struct json_writer *w)
{
    if (w->code)
        return;
    if (in_object(w)) {
        if (!w->keyed)
            fail(w, ERR_INTERNAL, "a value without a key in an object");
    } else if (w->comma) {
        if (w->depth)
            put_char(w, ',');
        else
            fail(w, ERR_INTERNAL, "a second value at the top");
    }
}

static void close_value(struct json_writer *w)
{
    w->keyed = false;
    w->comma = true;
}

static void begin(struct json_writer *w, bool object)
{
    open_value(w);
    if (w->code)
        return;
    if (w->depth == JSON_WRITER_DEPTH_MAX) {
        fail(w, ERR_INTERNAL, "nested too deep");
        return;
    }
    put_char(w, object ? '{' : '[');
    if (object)
        w->objects |= 1ull << w->depth;
    else
        w->objects &= ~(1ull << w->depth);
    w->depth++;
    w->keyed = false;
    w->comma = false;
}

static void end(struct json_writer *w, bool object)
{
    if (w->code)
        return;
    if (!w->depth || in_object(w) != object || w->keyed) {
        fail(w, ERR_INTERNAL, "an end that matches no begin");
        return;
    }
    put_char(w, object ? '}' : ']');
    w->depth--;
    close_value(w);
}

void json_begin_object(struct json_writer *writer)
{
    begin(writer, true);
}

void json_end_object(struct json_writer *writer)
{
    end(writer, true);
}

void json_begin_array(struct json_writer *writer)
{
    begin(writer, false);
}

void json_end_array(struct json_writer *writer)
{
    end(writer, false);
}

int json_writer_finish(struct json_writer *writer, const char **text, size_t *bytes,
                       struct error *err)
{
    if (!writer->code && (writer->depth || !writer->comma))
        fail(writer, ERR_INTERNAL, "not finished");
    if (writer->code == ERR_BUDGET)
        return error_set(err, ERR_BUDGET, "%s of %zu bytes", writer->problem, writer->bytes_max);
    if (writer->code)
        return error_set(err, writer->code, "writing JSON: %s", writer->problem);
    writer->text[writer->bytes] = 0;
    *text = writer->text;
    *bytes = writer->bytes;
    return 0;
}

int json_writer_take(struct json_writer *writer, char **text, size_t *bytes, struct error *err)
{
    const char *whole;

    if (json_writer_finish(writer, &whole, bytes, err) < 0)
        return -1;
    *text = writer->text;
    writer->text = NULL;
    writer->capacity = 0;
    json_writer_reset(writer);
    return 0;
}

/* ---- strings ---- */

/* Well-formed UTF-8 with escapes, without the quotes. */
static void put_escaped(struct json_writer *w, const char *text, size_t bytes)
{
    static const char hex[] = "0123456789abcdef", names[] = "\"\\bfnrt",
                      values[] = "\"\\\b\f\n\r\t";
    size_t start = 0;

    for (size_t i = 0; i < bytes; i++) {
        unsigned char c = (unsigned char)text[i];
        char escape[6] = {'\\', 'u', '0', '0', hex[c >> 4], hex[c & 15]};
        const char *value;
        size_t escape_bytes = 6;

        if (c >= 0x20 && c != '"' && c != '\\')
            continue;
        value = c ? strchr(values, c) : NULL;
        if (value) {
            escape[1] = names[value - values];
            escape_bytes = 2;
        }
        put(w, text + start, i - start);
        put(w, escape, escape_bytes);
        start = i + 1;
    }
    put(w, text + start, bytes - start);
}

static void put_quoted(struct json_writer *w, const char *text, size_t bytes)
{
    put_char(w, '"');
    for (;;) {
        size_t valid = utf8_valid_bytes(text, bytes);

        put_escaped(w, text, valid);
        if (valid == bytes)
            break;
        put(w, "\xef\xbf\xbd", 3); /* U+FFFD for one byte, then on */
        text += valid + 1;
        bytes -= valid + 1;
    }
    put_char(w, '"');
}

void json_key_bytes(struct json_writer *writer, const char *name, size_t bytes)
{
    if (writer->code)
        return;
    if (!in_object(writer) || writer->keyed) {
        fail(writer, ERR_INTERNAL, "a key where none belongs");
        return;
    }
    if (writer->comma)
        put_char(writer, ',');
    put_quoted(writer, name, bytes);
    put_char(writer, ':');
    writer->keyed = true;
}

void json_key(struct json_writer *writer, const char *name)
{
    json_key_bytes(writer, name, strlen(name));
}

void json_string_bytes(struct json_writer *writer, const char *text, size_t bytes)
{
    open_value(writer);
    put_quoted(writer, text, bytes);
    close_value(writer);
}

void json_string(struct json_writer *writer, const char *text)
{
    json_string_bytes(writer, text, strlen(text));
}

void json_raw(struct json_writer *writer, const char *text, size_t bytes)
{
    open_value(writer);
    put(writer, text, bytes);
    close_value(writer);
}

void json_base64(struct json_writer *writer, const void *data, size_t bytes)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const uint8_t *p = data;
    char *at;

    open_value(writer);
    if (bytes > writer->bytes_max) /* keeps the product below from overflowing */
        fail(writer, ERR_BUDGET, "the answer would be larger than its limit");
    at = reserve(writer, (bytes / 3 + (bytes % 3 != 0)) * 4 + 2);
    if (!at)
        return;
    *at++ = '"';
    for (; bytes >= 3; bytes -= 3, p += 3) {
        *at++ = digits[p[0] >> 2];
        *at++ = digits[(p[0] & 3) << 4 | p[1] >> 4];
        *at++ = digits[(p[1] & 15) << 2 | p[2] >> 6];
        *at++ = digits[p[2] & 63];
    }
    if (bytes) {
        uint8_t second = bytes == 2 ? p[1] : 0;

        *at++ = digits[p[0] >> 2];
        *at++ = digits[(p[0] & 3) << 4 | second >> 4];
        *at++ = bytes == 2 ? digits[(second & 15) << 2] : '=';
        *at++ = '=';
    }
    *at++ = '"';
    writer->bytes = (size_t)(at - writer->text);
    close_value(writer);
}

/* ---- numbers ---- */

static size_t uint_text(uint64_t value, char *out)
{
    char reversed[20];
    size_t n = 0;

    do {
        reversed[n++] = (char)('0' + value % 10);
        value /= 10;
    } while (value);
    for (size_t i = 0; i < n; i++)
        out[i] = reversed[n - 1 - i];
    out[n] = 0;
    return n;
}

/* Lays out 0.d1d2d3... x 10^(point): plain where that is short, else with an exponent. */
static size_t render(bool negative, const char *digits, size_t count, int point, char *out)
{
    char *at = out;

    while (count > 1 && digits[count - 1] == '0')
        count--;
    if (negative)
        *at++ = '-';
    if (point > -5 && point <= 0) {
        *at++ = '0';
        *at++ = '.';
        for (int i = point; i < 0; i++)
            *at++ = '0';
        memcpy(at, digits, count);
        at += count;
    } else if (point > 0 && point <= 17) {
        for (int i = 0; i < point; i++)
            *at++ = (size_t)i < count ? digits[i] : '0';
        if (count > (size_t)point) {
            *at++ = '.';
            memcpy(at, digits + point, count - (size_t)point);
            at += count - (size_t)point;
        }
    } else {
        *at++ = digits[0];
        if (count > 1) {
            *at++ = '.';
            memcpy(at, digits + 1, count - 1);
            at += count - 1;
        }
        *at++ = 'e';
        if (point - 1 < 0)
            *at++ = '-';
        at += uint_text((uint64_t)abs(point - 1), at);
    }
    *at = 0;
    return (size_t)(at - out);
}

/* The exact way: printf's correctly rounded digits, more of them until they read back. */
static size_t format_slow(double value, bool single, char *out)
{
    locale_t c_locale = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    locale_t before = c_locale ? uselocale(c_locale) : (locale_t)0;
    bool subnormal = fabs(value) < (single ? (double)FLT_MIN : DBL_MIN);
    int most = single ? 9 : 17;
    char text[40], digits[20];
    size_t count = 0;

    /* Decimals of up to 6 (15) digits survive a normal float (double), so fewer need no try. */
    for (int n = subnormal ? 1 : single ? 6 : 15; n <= most; n++) {
        snprintf(text, sizeof text, "%.*e", n - 1, fabs(value));
        if ((single ? (double)strtof(text, NULL) : strtod(text, NULL)) == fabs(value))
            break;
    }
    if (c_locale) {
        uselocale(before);
        freelocale(c_locale);
    }
    const char *p = text;
    for (; *p && *p != 'e'; p++)
        if (*p >= '0' && *p <= '9')
            digits[count++] = *p;
    return render(signbit(value), digits, count, (int)strtol(p + 1, NULL, 10) + 1, out);
}

static size_t format_whole(double value, char *out)
{
    if (value == 0 && signbit(value)) {
        memcpy(out, "-0.0", 5); /* with a fraction, lest a reader makes it the integer 0 */
        return 4;
    }
    if (value < 0) {
        out[0] = '-';
        return 1 + uint_text((uint64_t)-value, out + 1);
    }
    return uint_text((uint64_t)value, out);
}

/* 10^n for |n| <= 60: a product of two exact doubles, or a quotient, is rounded once or twice. */
static double scale(double value, int n)
{
    static const double powers[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                                    1e8,  1e9,  1e10, 1e11, 1e12, 1e13, 1e14, 1e15,
                                    1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};

    for (; n > 22; n -= 22)
        value *= 1e22;
    for (; n < -22; n += 22)
        value /= 1e22;
    return n < 0 ? value / powers[-n] : value * powers[n];
}

size_t json_format_float(float value, char out[JSON_FLOAT_TEXT_BYTES])
{
    float size = fabsf(value);
    double wide = (double)size, low, high;
    uint32_t bits;
    int exponent2, exponent10;

    assert(isfinite(value));
    if (size < 0x1p24f && size == (float)(uint32_t)size)
        return format_whole((double)value, out);
    if (size < FLT_MIN || size > 0x1p127f)
        return format_slow((double)value, true, out);

    /* What lies between the middles to both neighbours reads back as value. */
    memcpy(&bits, &size, sizeof bits);
    low = (wide + (double)load_f32(&(uint32_t){bits - 1})) / 2;
    high = (wide + (double)load_f32(&(uint32_t){bits + 1})) / 2;

    frexp(wide, &exponent2);
    exponent10 = (int)floor((exponent2 - 1) * 0.30102999566398120); /* right or one too small */
    if (scale(wide, -exponent10) >= 10)
        exponent10++;
    for (int n = 6; n <= 9; n++) {
        int shift = n - 1 - exponent10;
        double whole = rint(scale(wide, shift)), back = scale(whole, -shift);

        /* `back` is off by a few units in its last place at most. */
        if (back > low * (1 + 0x1p-48) && back < high * (1 - 0x1p-48)) {
            char digits[24];
            size_t count = uint_text((uint64_t)whole, digits);

            /* One digit more when rounding went up to the next power of ten. */
            return render(value < 0, digits, count, exponent10 + 1 + ((int)count - n), out);
        }
        if (back > low * (1 - 0x1p-48) && back < high * (1 + 0x1p-48))
            break;
    }
    return format_slow((double)value, true, out);
}

size_t json_format_double(double value, char out[JSON_FLOAT_TEXT_BYTES])
{
    assert(isfinite(value));
    if (fabs(value) < 0x1p53 && value == (double)(int64_t)value)
        return format_whole(value, out);
    return format_slow(value, false, out);
}

static void put_value(struct json_writer *w, const char *text, size_t bytes)
{
    open_value(w);
    put(w, text, bytes);
    close_value(w);
}

void json_int64(struct json_writer *writer, int64_t value)
{
    char text[JSON_FLOAT_TEXT_BYTES];
    int bytes = snprintf(text, sizeof text, "%" PRId64, value);

    put_value(writer, text, (size_t)bytes);
}

void json_int64_string(struct json_writer *writer, int64_t value)
{
    char text[JSON_FLOAT_TEXT_BYTES];
    int bytes = snprintf(text, sizeof text, "\"%" PRId64 "\"", value);

    put_value(writer, text, (size_t)bytes);
}

void json_uint64(struct json_writer *writer, uint64_t value)
{
    char text[JSON_FLOAT_TEXT_BYTES];

    put_value(writer, text, uint_text(value, text));
}

void json_bool(struct json_writer *writer, bool value)
{
    put_value(writer, value ? "true" : "false", value ? 4 : 5);
}

void json_null(struct json_writer *writer)
{
    put_value(writer, "null", 4);
}

void json_float(struct json_writer *writer, float value)
{
    char text[JSON_FLOAT_TEXT_BYTES];

    if (!isfinite(value))
        fail(writer, ERR_INVALID, "NaN and infinity have no JSON text");
    else
        put_value(writer, text, json_format_float(value, text));
}

void json_double(struct json_writer *writer, double value)
{
    char text[JSON_FLOAT_TEXT_BYTES];

    if (!isfinite(value))
        fail(writer, ERR_INVALID, "NaN and infinity have no JSON text");
    else
        put_value(writer, text, json_format_double(value, text));
}

void json_float_array(struct json_writer *writer, const float *values, size_t count)
{
    json_begin_array(writer);
    for (size_t i = 0; i < count && !writer->code; i++)
        json_float(writer, values[i]);
    json_end_array(writer);
}
