/* How it works: the reader is a position, a stack of one bit per level (object or array) and a
 * state that says what may stand next. A comma is taken as soon as somebody looks past it, so every
 * entry point begins with settle(). Strings are validated in one pass and decoded in a second one
 * only when they hold a backslash; otherwise they are used where they lie.
 *
 * Numbers are scanned once into (up to 19 significant digits, power of ten). For float32 the
 * product of the two in double arithmetic is wrong by less than 2 units in the last place, and
 * rounding it to 24 bits is right unless it lies that close to the middle between two floats: then,
 * and for subnormals, strtof decides. This is the idea of Clinger, "How to Read Floating Point
 * Numbers Accurately", PLDI 1990, with the wide double as the guard: the 17-digit numbers that
 * Python prints for float32 stay on the quick path. */
#include "storage/base/json_reader.h"

#include <float.h>
#include <locale.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "storage/base/bytes.h"

enum state {
    AT_VALUE,
    AT_FIRST_ELEMENT, /* a value or ] */
    AT_FIRST_KEY,     /* a key or } */
    AT_KEY,
    AFTER_VALUE, /* comma or close; at depth 0 the end */
    FAILED
};

#define ONES 0x0101010101010101ull
#define POOL_CHUNK_BYTES 4096u
#define DIGITS_MAX 19 /* so many always fit 64 bits */
#define POWER_MAX 64

static const double powers[POWER_MAX + 1] = {
    1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11, 1e12,
    1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22, 1e23, 1e24, 1e25,
    1e26, 1e27, 1e28, 1e29, 1e30, 1e31, 1e32, 1e33, 1e34, 1e35, 1e36, 1e37, 1e38,
    1e39, 1e40, 1e41, 1e42, 1e43, 1e44, 1e45, 1e46, 1e47, 1e48, 1e49, 1e50, 1e51,
    1e52, 1e53, 1e54, 1e55, 1e56, 1e57, 1e58, 1e59, 1e60, 1e61, 1e62, 1e63, 1e64};

/* Rounded, unlike the first 23 above: for number_float() alone. */
static const double inverse_powers[POWER_MAX + 1] = {
    1e-0,  1e-1,  1e-2,  1e-3,  1e-4,  1e-5,  1e-6,  1e-7,  1e-8,  1e-9,  1e-10, 1e-11, 1e-12,
    1e-13, 1e-14, 1e-15, 1e-16, 1e-17, 1e-18, 1e-19, 1e-20, 1e-21, 1e-22, 1e-23, 1e-24, 1e-25,
    1e-26, 1e-27, 1e-28, 1e-29, 1e-30, 1e-31, 1e-32, 1e-33, 1e-34, 1e-35, 1e-36, 1e-37, 1e-38,
    1e-39, 1e-40, 1e-41, 1e-42, 1e-43, 1e-44, 1e-45, 1e-46, 1e-47, 1e-48, 1e-49, 1e-50, 1e-51,
    1e-52, 1e-53, 1e-54, 1e-55, 1e-56, 1e-57, 1e-58, 1e-59, 1e-60, 1e-61, 1e-62, 1e-63, 1e-64};

/* ---- errors ---- */

static int fail(struct json_reader *r, struct error *err, const char *what, size_t position)
{
    r->state = FAILED;
    return error_set(err, ERR_INVALID, "%s at byte %zu", what, position);
}

/* What stands at `position` is not what belongs there. */
static int fail_expected(struct json_reader *r, struct error *err, const char *expected,
                         size_t position)
{
    r->state = FAILED;
    if (position >= r->bytes)
        return error_set(err, ERR_INVALID, "the text ends where %s belongs, at byte %zu", expected,
                         position);
    unsigned char c = (unsigned char)r->text[position];
    if (c > 0x20 && c < 0x7f)
        return error_set(err, ERR_INVALID, "found '%c' where %s belongs, at byte %zu", c, expected,
                         position);
    return error_set(err, ERR_INVALID, "found byte 0x%02x where %s belongs, at byte %zu", c,
                     expected, position);
}

static int fail_again(struct error *err)
{
    return error_set(err, ERR_INVALID, "the JSON text was refused before");
}

/* ---- UTF-8 and strings ---- */

/* Bytes of the well-formed sequence at p, whose first byte is >= 0x80; 0 if it is not one.
 * The ranges are table 3-7 of the Unicode Standard. */
static size_t utf8_sequence(const unsigned char *p, size_t left)
{
    unsigned char c = p[0], low = 0x80, high = 0xbf;
    size_t n;

    if (c >= 0xc2 && c <= 0xdf) {
        n = 2;
    } else if (c >= 0xe0 && c <= 0xef) {
        n = 3;
        if (c == 0xe0)
            low = 0xa0; /* below: overlong */
        else if (c == 0xed)
            high = 0x9f; /* above: surrogates */
    } else if (c >= 0xf0 && c <= 0xf4) {
        n = 4;
        if (c == 0xf0)
            low = 0x90;
        else if (c == 0xf4)
            high = 0x8f; /* above: past U+10FFFF */
    } else {
        return 0;
    }
    if (left < n || p[1] < low || p[1] > high)
        return 0;
    for (size_t i = 2; i < n; i++)
        if ((p[i] & 0xc0) != 0x80)
            return 0;
    return n;
}

size_t utf8_valid_bytes(const char *text, size_t bytes)
{
    const unsigned char *p = (const unsigned char *)text;
    size_t i = 0;

    while (i < bytes) {
        if (bytes - i >= 8 && !(load_u64(p + i) & (ONES * 0x80))) {
            i += 8;
        } else if (p[i] < 0x80) {
            i++;
        } else {
            size_t n = utf8_sequence(p + i, bytes - i);
            if (!n)
                break;
            i += n;
        }
    }
    return i;
}

static int hex_digit(unsigned char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* The code unit of "\uXXXX" at p, or -1. */
static int32_t escape_unit(const char *p, size_t left)
{
    int32_t unit = 0;

    if (left < 6 || p[0] != '\\' || p[1] != 'u')
        return -1;
    for (int i = 2; i < 6; i++) {
        int digit = hex_digit((unsigned char)p[i]);
        if (digit < 0)
            return -1;
        unit = unit << 4 | digit;
    }
    return unit;
}

/* The code point of the escape at p, a backslash, and its length; -1 if it is not one that we take,
 * and then *problem says why. */
static int32_t escape_read(const char *p, size_t left, size_t *length, const char **problem)
{
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    const char *name;

    *length = 2;
    *problem = "an escape that JSON does not have";
    if (left < 2 || !p[1])
        return -1;
    name = strchr(names, p[1]);
    if (name)
        return values[name - names];
    if (p[1] != 'u')
        return -1;

    int32_t unit = escape_unit(p, left);
    *length = 6;
    if (unit < 0) {
        *problem = "\\u without four hexadecimal digits";
        return -1;
    }
    if (unit == 0) {
        *problem = "the character U+0000 is not accepted,";
        return -1;
    }
    if (unit < 0xd800 || unit > 0xdfff)
        return unit;

    int32_t second = unit < 0xdc00 ? escape_unit(p + 6, left - 6) : -1;
    if (second < 0xdc00 || second > 0xdfff) {
        *problem = "an unpaired surrogate";
        return -1;
    }
    *length = 12;
    return 0x10000 + ((unit - 0xd800) << 10) + (second - 0xdc00);
}

static size_t utf8_put(char *out, int32_t c)
{
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    if (c < 0x800) {
        out[0] = (char)(0xc0 | c >> 6);
        out[1] = (char)(0x80 | (c & 0x3f));
        return 2;
    }
    if (c < 0x10000) {
        out[0] = (char)(0xe0 | c >> 12);
        out[1] = (char)(0x80 | (c >> 6 & 0x3f));
        out[2] = (char)(0x80 | (c & 0x3f));
        return 3;
    }
    out[0] = (char)(0xf0 | c >> 18);
    out[1] = (char)(0x80 | (c >> 12 & 0x3f));
    out[2] = (char)(0x80 | (c >> 6 & 0x3f));
    out[3] = (char)(0x80 | (c & 0x3f));
    return 4;
}

/* Many small strings share a chunk: an arena grant is 64 bytes at least. */
static char *pool_alloc(struct json_reader *r, size_t bytes)
{
    char *at;

    if (bytes > r->pool_bytes) {
        if (bytes >= POOL_CHUNK_BYTES / 4)
            return arena_alloc(r->arena, bytes);
        at = arena_alloc(r->arena, POOL_CHUNK_BYTES);
        if (!at)
            return arena_alloc(r->arena, bytes);
        r->pool = at;
        r->pool_bytes = POOL_CHUNK_BYTES;
    }
    at = r->pool;
    r->pool += bytes;
    r->pool_bytes -= bytes;
    return at;
}

static int string_decode(struct json_reader *r, struct json_span raw, struct json_span *out,
                         struct error *err)
{
    const char *problem;
    char *text;
    size_t i = 0, n = 0;

    if (!r->arena)
        return fail(r, err, "a string with escapes is not accepted here,", r->position);
    text = pool_alloc(r, raw.bytes); /* decoding never lengthens */
    if (!text) {
        r->state = FAILED;
        return error_set(err, ERR_BUDGET,
                         "no memory left for the %zu bytes of the string at byte %zu", raw.bytes,
                         r->position);
    }
    while (i < raw.bytes) {
        if (raw.at[i] != '\\') {
            text[n++] = raw.at[i++];
            continue;
        }
        size_t length;
        int32_t c = escape_read(raw.at + i, raw.bytes - i, &length, &problem);
        n += utf8_put(text + n, c); /* c >= 0: string_scan has seen it */
        i += length;
    }
    if (text + raw.bytes == r->pool) { /* the unused tail goes back */
        r->pool -= raw.bytes - n;
        r->pool_bytes += raw.bytes - n;
    }
    out->at = text;
    out->bytes = n;
    return 0;
}

/* The string whose opening quote is at the reader's position; moves past its closing quote.
 * raw is what lies between the quotes. */
static int string_scan(struct json_reader *r, struct json_span *raw, bool *escapes,
                       struct error *err)
{
    const unsigned char *p = (const unsigned char *)r->text;
    size_t i = r->position + 1;
    const char *problem;

    *escapes = false;
    for (;;) {
        while (r->bytes - i >= 8) { /* eight plain ASCII characters at once */
            uint64_t x = load_u64(p + i);
            uint64_t special =
                (x - ONES * 0x20) | ((x ^ (ONES * '"')) - ONES) | ((x ^ (ONES * '\\')) - ONES) | x;
            if (special & (ONES * 0x80))
                break;
            i += 8;
        }
        if (i >= r->bytes)
            return fail(r, err, "the text ends inside a string,", i);
        if (p[i] == '"')
            break;
        if (p[i] == '\\') {
            size_t length;
            if (escape_read(r->text + i, r->bytes - i, &length, &problem) < 0)
                return fail(r, err, problem, i);
            *escapes = true;
            i += length;
        } else if (p[i] < 0x20) {
            return fail(r, err, "a control character inside a string", i);
        } else if (p[i] < 0x80) {
            i++;
        } else {
            size_t n = utf8_sequence(p + i, r->bytes - i);
            if (!n)
                return fail(r, err, "bytes that are not UTF-8 inside a string", i);
            i += n;
        }
    }
    raw->at = r->text + r->position + 1;
    raw->bytes = i - (r->position + 1);
    return 0;
}

/* ---- numbers ---- */

struct number {
    uint64_t digits; /* the first DIGITS_MAX significant ones */
    int32_t exp10;   /* the value is digits x 10^exp10, */
    bool cut;        /* and a little more when digits were left out */
    bool negative;
    bool integer; /* neither fraction nor exponent */
};

static bool is_digit(char c)
{
    return (unsigned char)(c - '0') < 10;
}

/* Adds the digits at p to *value and returns their end. Eight bytes at a time and, where eight can
 * be read, without a branch on how many of them are digits, since that is what a branch predictor
 * gets wrong in a list of numbers. After Lemire, "Number Parsing at a Gigabyte per Second", 2021.
 */
static inline const char *digits_scan(const char *p, const char *end, uint64_t *value)
{
    static const uint32_t power[9] = {1,      10,      100,      1000,     10000,
                                      100000, 1000000, 10000000, 100000000};

    while (end - p >= 8) {
        uint64_t x = load_u64(p) ^ (ONES * '0');
        uint64_t others =
            ((x + ONES * 0x76) | x) & (ONES * 0x80); /* first set: the first no digit */
        unsigned count = others ? (unsigned)__builtin_ctzll(others) / 8 : 8;

        if (!count)
            return p;
        x <<= 64 - 8 * count; /* leading zeros instead of what follows */
        x = x * 10 + (x >> 8);
        x = ((x & 0x000000ff000000ffull) * 0x000f424000000064ull +
             (x >> 16 & 0x000000ff000000ffull) * 0x0000271000000001ull) >>
            32;
        *value = *value * power[count] + (uint32_t)x;
        p += count;
        if (count < 8)
            return p;
    }
    while (p < end && is_digit(*p))
        *value = *value * 10 + (uint64_t)(*p++ - '0');
    return p;
}

/* More digits than 64 bits hold: the first DIGITS_MAX significant ones, again. */
static void number_cut(const char *p, const char *end, struct number *n)
{
    int kept = 0;
    bool point = false;

    n->digits = 0;
    n->exp10 = 0;
    for (; p < end; p++) {
        if (*p == '.') {
            point = true;
        } else if (kept < DIGITS_MAX) {
            if (kept || *p != '0') {
                n->digits = n->digits * 10 + (uint64_t)(*p - '0');
                kept++;
            }
            n->exp10 -= point;
        } else {
            n->cut = true;
            n->exp10 += !point;
        }
    }
}

/* Scans the number at p; returns its end, or NULL with *wrong at what is no part of a number. */
static inline __attribute__((always_inline)) const char *
number_scan(const char *p, const char *end, struct number *n, const char **wrong)
{
    const char *start = p, *first, *point = NULL, *mantissa_end;
    uint64_t digits = 0;
    int32_t exp10 = 0;

    *n = (struct number){.integer = true};
    n->negative = p < end && *p == '-';
    p += n->negative; /* no branch: signs are as good as random */
    first = p;
    if (p >= end || !is_digit(*p))
        goto bad;
    if (*p == '0')
        p++; /* a digit after it is for the caller to refuse */
    else
        p = digits_scan(p, end, &digits);
    if (p < end && *p == '.') {
        n->integer = false;
        point = ++p;
        p = digits_scan(p, end, &digits);
        if (p == point)
            goto bad;
        exp10 = -(int32_t)(p - point <= (ptrdiff_t)JSON_NUMBER_BYTES_MAX
                               ? p - point
                               : (ptrdiff_t)JSON_NUMBER_BYTES_MAX + 1);
    }
    mantissa_end = p;
    n->digits = digits;
    n->exp10 = exp10;
    if (p - first - (point != NULL) > DIGITS_MAX) {
        if (p - start > (ptrdiff_t)JSON_NUMBER_BYTES_MAX) {
            p = start;
            goto bad;
        }
        number_cut(first, mantissa_end, n);
    }
    if (p < end && (*p | 0x20) == 'e') {
        bool negative = false;
        int32_t value = 0;

        n->integer = false;
        p++;
        if (p < end && (*p == '+' || *p == '-'))
            negative = *p++ == '-';
        if (p >= end || !is_digit(*p))
            goto bad;
        for (; p < end && is_digit(*p); p++)
            if (value < 100000) /* far past any range, far from overflow */
                value = value * 10 + (*p - '0');
        n->exp10 += negative ? -value : value;
    }
    if (p - start > (ptrdiff_t)JSON_NUMBER_BYTES_MAX) {
        p = start;
        goto bad;
    }
    return p;
bad:
    *wrong = p;
    return NULL;
}

static int fail_number(struct json_reader *r, const char *start, const char *wrong,
                       struct error *err)
{
    if (wrong != start || wrong == r->text + r->bytes || (*wrong != '-' && !is_digit(*wrong)))
        return fail_expected(r, err, "a digit", (size_t)(wrong - r->text));
    r->state = FAILED;
    return error_set(err, ERR_INVALID, "a number of more than %u characters at byte %zu",
                     JSON_NUMBER_BYTES_MAX, (size_t)(start - r->text));
}

/* strtod and strtof want a NUL and a locale with a decimal point: newlocale() hands out the C
 * library's own constant for "C", so this neither allocates nor shares anything. */
static double number_slow(const char *raw, size_t bytes, bool single)
{
    char text[JSON_NUMBER_BYTES_MAX + 1];
    locale_t c_locale = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    double value;

    if (bytes > JSON_NUMBER_BYTES_MAX)
        bytes = JSON_NUMBER_BYTES_MAX;
    memcpy(text, raw, bytes);
    text[bytes] = 0;
    if (!c_locale)
        return single ? strtof(text, NULL) : strtod(text, NULL);
    value = single ? strtof_l(text, NULL, c_locale) : strtod_l(text, NULL, c_locale);
    freelocale(c_locale);
    return value;
}

/* False when the number is beyond float32. */
static inline bool number_float(const struct number *n, const char *raw, size_t bytes, float *out)
{
    float value;

    if (!n->digits) {
        *out = n->negative ? -0.0f : 0.0f;
        return true;
    }
    if (n->exp10 >= -POWER_MAX && n->exp10 <= 38) {
        double wide = (double)n->digits;
        uint64_t bits;

        wide *= n->exp10 < 0 ? inverse_powers[-n->exp10] : powers[n->exp10];
        memcpy(&bits, &wide, sizeof bits);
        /* Distance to the middle between two floats, in units of the double's last place. */
        uint64_t from_middle = (bits & 0x1fffffffu) - (0x10000000u - 8);
        if (wide >= (double)FLT_MIN && from_middle > 16) {
            if (wide > 0x1.ffffffp127)
                return false;
            bits |= (uint64_t)n->negative << 63;
            *out = (float)load_f64(&bits);
            return true;
        }
    }
    value = (float)number_slow(raw, bytes, true);
    if (isinf(value))
        return false;
    *out = value;
    return true;
}

static int fail_range(struct error *err, const char *type, struct json_span raw, size_t position)
{
    return error_set(err, ERR_INVALID, "the number %.*s%s is beyond the range of %s, at byte %zu",
                     (int)(raw.bytes < 40 ? raw.bytes : 40), raw.at, raw.bytes > 40 ? "..." : "",
                     type, position);
}

static int digits_int64(struct json_span raw, size_t position, int64_t *out, struct error *err)
{
    struct number n;
    const char *wrong, *end = raw.at + raw.bytes;

    /* Bytes of a string are not echoed: what it holds may be anything. */
    if (number_scan(raw.at, end, &n, &wrong) != end || !n.integer || (n.negative && !n.digits))
        return error_set(err, ERR_INVALID,
                         "wanted a whole number in plain digits, without fraction, exponent, "
                         "leading zeros or -0, at byte %zu",
                         position);
    /* An integer literal has no leading zeros, so a cut one is past 10^19. */
    if (n.cut || n.exp10 || n.digits > (uint64_t)INT64_MAX + n.negative)
        return fail_range(err, "int64", raw, position);
    *out = n.negative ? (int64_t)(0 - n.digits) : (int64_t)n.digits;
    return 0;
}

int json_number_int64(const struct json_token *token, int64_t *out, struct error *err)
{
    if (token->type != JSON_NUMBER)
        return error_set(err, ERR_INVALID, "found %s where a whole number belongs, at byte %zu",
                         json_type_name(token->type), token->offset);
    return digits_int64(token->raw, token->offset, out, err);
}

int json_string_int64(const struct json_token *token, int64_t *out, struct error *err)
{
    if (token->type != JSON_STRING)
        return error_set(err, ERR_INVALID, "found %s where a string of digits belongs, at byte %zu",
                         json_type_name(token->type), token->offset);
    return digits_int64(token->text, token->offset, out, err);
}

/* The token's number scanned again: true unless it is no number. */
static bool token_number(const struct json_token *token, struct number *n, struct error *err)
{
    const char *wrong, *end = token->raw.at + token->raw.bytes;

    if (token->type == JSON_NUMBER && number_scan(token->raw.at, end, n, &wrong) == end)
        return true;
    error_set(err, ERR_INVALID, "found %s where a number belongs, at byte %zu",
              json_type_name(token->type), token->offset);
    return false;
}

int json_number_double(const struct json_token *token, double *out, struct error *err)
{
    struct number n;
    double value;

    if (!token_number(token, &n, err))
        return -1;
    if (!n.cut && n.digits <= 1ull << 53 && n.exp10 >= -22 && n.exp10 <= 22) {
        /* Both operands are exact, so the one rounding is the right one. */
        value = (double)n.digits;
        value = n.exp10 < 0 ? value / powers[-n.exp10] : value * powers[n.exp10];
        if (n.negative)
            value = -value;
    } else {
        value = number_slow(token->raw.at, token->raw.bytes, false);
    }
    if (isinf(value))
        return fail_range(err, "double", token->raw, token->offset);
    *out = value;
    return 0;
}

int json_number_float(const struct json_token *token, float *out, struct error *err)
{
    struct number n;

    if (!token_number(token, &n, err))
        return -1;
    if (!number_float(&n, token->raw.at, token->raw.bytes, out))
        return fail_range(err, "float32", token->raw, token->offset);
    return 0;
}

/* ---- tokens ---- */

void json_reader_init(struct json_reader *reader, const char *text, size_t bytes,
                      struct arena *arena)
{
    *reader = (struct json_reader){.text = text, .bytes = bytes, .arena = arena, .state = AT_VALUE};
}

const char *json_type_name(enum json_type type)
{
    switch (type) {
    case JSON_BEGIN_OBJECT:
        return "an object";
    case JSON_END_OBJECT:
        return "the end of an object";
    case JSON_BEGIN_ARRAY:
        return "an array";
    case JSON_END_ARRAY:
        return "the end of an array";
    case JSON_KEY:
        return "a key";
    case JSON_STRING:
        return "a string";
    case JSON_NUMBER:
        return "a number";
    case JSON_TRUE:
        return "true";
    case JSON_FALSE:
        return "false";
    case JSON_NULL:
        return "null";
    case JSON_END:
        return "the end of the text";
    }
    return "unknown";
}

static bool is_space(char c)
{
    return c == ' ' || c == '\n' || c == '\r' || c == '\t';
}

static void skip_space(struct json_reader *r)
{
    while (r->position < r->bytes && is_space(r->text[r->position]))
        r->position++;
}

static bool in_object(const struct json_reader *r)
{
    return r->depth && (r->objects >> (r->depth - 1) & 1);
}

/* The next significant byte, past a comma if one is due; -1 at the end of the text. */
static int settle(struct json_reader *r)
{
    skip_space(r);
    if (r->state == AFTER_VALUE && r->depth && r->position < r->bytes &&
        r->text[r->position] == ',') {
        r->position++;
        r->state = in_object(r) ? AT_KEY : AT_VALUE;
        skip_space(r);
    }
    return r->position < r->bytes ? (unsigned char)r->text[r->position] : -1;
}

static int push(struct json_reader *r, bool object, struct error *err)
{
    if (r->depth == JSON_DEPTH_MAX)
        return fail(r, err, "nested deeper than 32 levels", r->position);
    if (object)
        r->objects |= 1u << r->depth;
    else
        r->objects &= ~(1u << r->depth);
    r->depth++;
    r->position++;
    r->state = object ? AT_FIRST_KEY : AT_FIRST_ELEMENT;
    return 0;
}

static void pop(struct json_reader *r)
{
    r->depth--;
    r->position++;
    r->state = AFTER_VALUE;
}

static int take_word(struct json_reader *r, const char *word, struct error *err)
{
    size_t bytes = strlen(word);

    if (r->bytes - r->position < bytes || memcmp(r->text + r->position, word, bytes) != 0)
        return fail_expected(r, err, "a value", r->position);
    r->position += bytes;
    return 0;
}

static int take_string(struct json_reader *r, struct json_token *token, bool decode,
                       struct error *err)
{
    bool escapes;

    if (string_scan(r, &token->text, &escapes, err) < 0)
        return -1;
    token->raw.bytes = token->text.bytes + 2;
    if (escapes && decode && string_decode(r, token->text, &token->text, err) < 0)
        return -1;
    r->position += token->raw.bytes;
    return 0;
}

static int next(struct json_reader *r, struct json_token *token, bool decode, struct error *err)
{
    const char *end, *wrong = NULL;
    struct number number;
    int c;

    if (r->state == FAILED)
        return fail_again(err);
    c = settle(r);
    *token = (struct json_token){.offset = r->position, .raw = {r->text + r->position, 1}};

    if (r->state == AFTER_VALUE) {
        if (!r->depth) {
            if (c >= 0)
                return fail_expected(r, err, "the end of the text", r->position);
            token->type = JSON_END;
            token->raw.bytes = 0;
            return 0;
        }
        if (c != (in_object(r) ? '}' : ']'))
            return fail_expected(r, err, in_object(r) ? "',' or '}'" : "',' or ']'", r->position);
    }
    if (r->state == AT_KEY || r->state == AT_FIRST_KEY) {
        if (c == '"') {
            token->type = JSON_KEY;
            if (take_string(r, token, decode, err) < 0)
                return -1;
            skip_space(r);
            if (r->position >= r->bytes || r->text[r->position] != ':')
                return fail_expected(r, err, "':'", r->position);
            r->position++;
            r->state = AT_VALUE;
            return 0;
        }
        if (r->state == AT_KEY || c != '}')
            return fail_expected(r, err, "a key in quotes", r->position);
    }

    switch (c) {
    case '}':
        if (r->state == AT_VALUE || !in_object(r))
            break;
        token->type = JSON_END_OBJECT;
        pop(r);
        return 0;
    case ']':
        if (r->state == AT_VALUE || in_object(r) || !r->depth)
            break;
        token->type = JSON_END_ARRAY;
        pop(r);
        return 0;
    case '{':
        token->type = JSON_BEGIN_OBJECT;
        return push(r, true, err);
    case '[':
        token->type = JSON_BEGIN_ARRAY;
        return push(r, false, err);
    case '"':
        token->type = JSON_STRING;
        if (take_string(r, token, decode, err) < 0)
            return -1;
        r->state = AFTER_VALUE;
        return 0;
    case 't':
    case 'f':
    case 'n':
        token->type = c == 't' ? JSON_TRUE : c == 'f' ? JSON_FALSE : JSON_NULL;
        if (take_word(r, c == 't' ? "true" : c == 'f' ? "false" : "null", err) < 0)
            return -1;
        break;
    case '-':
    case '0' ... '9':
        token->type = JSON_NUMBER;
        end = number_scan(token->raw.at, r->text + r->bytes, &number, &wrong);
        if (!end)
            return fail_number(r, token->raw.at, wrong, err);
        r->position = (size_t)(end - r->text);
        break;
    default:
        break;
    }
    if (r->position == token->offset)
        return fail_expected(r, err, "a value", r->position);
    token->raw.bytes = r->position - token->offset;
    r->state = AFTER_VALUE;
    return 0;
}

int json_next(struct json_reader *reader, struct json_token *token, struct error *err)
{
    return next(reader, token, true, err);
}

int json_peek(struct json_reader *reader, enum json_type *type, struct error *err)
{
    int c;

    if (reader->state == FAILED)
        return fail_again(err);
    c = settle(reader);
    switch (c) {
    case '{':
        *type = JSON_BEGIN_OBJECT;
        return 0;
    case '}':
        *type = JSON_END_OBJECT;
        return 0;
    case '[':
        *type = JSON_BEGIN_ARRAY;
        return 0;
    case ']':
        *type = JSON_END_ARRAY;
        return 0;
    case '"':
        *type = reader->state == AT_KEY || reader->state == AT_FIRST_KEY ? JSON_KEY : JSON_STRING;
        return 0;
    case 't':
        *type = JSON_TRUE;
        return 0;
    case 'f':
        *type = JSON_FALSE;
        return 0;
    case 'n':
        *type = JSON_NULL;
        return 0;
    case '-':
    case '0' ... '9':
        *type = JSON_NUMBER;
        return 0;
    case -1:
        if (reader->state == AFTER_VALUE && !reader->depth) {
            *type = JSON_END;
            return 0;
        }
        break;
    default:
        break;
    }
    return fail_expected(reader, err, "a value", reader->position);
}

/* ---- one value at a time ---- */

/* A well-formed token of another type than wanted: as final as bad syntax. */
static int fail_type(struct json_reader *r, const struct json_token *token, const char *wanted,
                     struct error *err)
{
    r->state = FAILED;
    return error_set(err, ERR_INVALID, "found %s where %s belongs, at byte %zu",
                     json_type_name(token->type), wanted, token->offset);
}

static int next_of_type(struct json_reader *r, enum json_type type, struct json_token *token,
                        struct error *err)
{
    if (json_next(r, token, err) < 0)
        return -1;
    if (token->type != type)
        return fail_type(r, token, json_type_name(type), err);
    return 0;
}

int json_object_begin(struct json_reader *reader, struct error *err)
{
    struct json_token token;

    return next_of_type(reader, JSON_BEGIN_OBJECT, &token, err);
}

int json_array_begin(struct json_reader *reader, struct error *err)
{
    struct json_token token;

    return next_of_type(reader, JSON_BEGIN_ARRAY, &token, err);
}

int json_read_end(struct json_reader *reader, struct error *err)
{
    struct json_token token;

    return next_of_type(reader, JSON_END, &token, err);
}

int json_object_next(struct json_reader *reader, struct json_span *key, struct error *err)
{
    struct json_token token;

    if (json_next(reader, &token, err) < 0)
        return -1;
    if (token.type == JSON_END_OBJECT)
        return 0;
    if (token.type != JSON_KEY)
        return fail_type(reader, &token, "a key", err);
    *key = token.text;
    return 1;
}

int json_array_next(struct json_reader *reader, struct error *err)
{
    struct json_token token;
    int c;

    if (reader->state == FAILED)
        return fail_again(err);
    c = settle(reader);
    if (!reader->depth || in_object(reader))
        return fail_expected(reader, err, "an array", reader->position);
    if (reader->state == AT_VALUE || (reader->state == AT_FIRST_ELEMENT && c != ']'))
        return 1;
    return json_next(reader, &token, err);
}

int json_read_string(struct json_reader *reader, struct json_span *out, struct error *err)
{
    struct json_token token;

    if (next_of_type(reader, JSON_STRING, &token, err) < 0)
        return -1;
    *out = token.text;
    return 0;
}

int json_read_int64(struct json_reader *reader, int64_t *out, struct error *err)
{
    struct json_token token;
    int rc;

    if (json_next(reader, &token, err) < 0)
        return -1;
    if (token.type == JSON_STRING)
        rc = json_string_int64(&token, out, err);
    else if (token.type == JSON_NUMBER)
        rc = json_number_int64(&token, out, err);
    else
        rc = fail_type(reader, &token, "a whole number", err);
    if (rc < 0)
        reader->state = FAILED;
    return rc;
}

int json_read_double(struct json_reader *reader, double *out, struct error *err)
{
    struct json_token token;

    if (next_of_type(reader, JSON_NUMBER, &token, err) < 0)
        return -1;
    if (json_number_double(&token, out, err) < 0) {
        reader->state = FAILED;
        return -1;
    }
    return 0;
}

int json_read_bool(struct json_reader *reader, bool *out, struct error *err)
{
    struct json_token token;

    if (json_next(reader, &token, err) < 0)
        return -1;
    if (token.type != JSON_TRUE && token.type != JSON_FALSE)
        return fail_type(reader, &token, "true or false", err);
    *out = token.type == JSON_TRUE;
    return 0;
}

bool json_read_null(struct json_reader *reader)
{
    struct json_reader ahead = *reader;
    struct json_token token;

    if (ahead.state == FAILED || settle(&ahead) != 'n' || next(&ahead, &token, false, NULL) < 0)
        return false;
    *reader = ahead;
    return true;
}

int json_raw_value(struct json_reader *reader, struct json_span *out, struct error *err)
{
    struct json_token token;
    uint32_t depth = reader->depth;
    size_t start;

    if (next(reader, &token, false, err) < 0)
        return -1;
    if (token.type == JSON_KEY || token.type == JSON_END_OBJECT || token.type == JSON_END_ARRAY ||
        token.type == JSON_END)
        return fail_type(reader, &token, "a value", err);
    start = token.offset;
    while (reader->depth > depth)
        if (next(reader, &token, false, err) < 0)
            return -1;
    out->at = reader->text + start;
    out->bytes = reader->position - start;
    return 0;
}

int json_skip_value(struct json_reader *reader, struct error *err)
{
    struct json_span span;

    return json_raw_value(reader, &span, err);
}

int json_read_float_array(struct json_reader *reader, float *out, size_t max, size_t *count,
                          struct error *err)
{
    const char *p, *end = reader->text + reader->bytes, *start, *wrong = NULL;
    struct number number;
    size_t n = 0;

    if (json_array_begin(reader, err) < 0)
        return -1;
    p = reader->text + reader->position;
    for (;;) {
        while (p < end && is_space(*p))
            p++;
        if (p < end && *p == ']' && n == 0)
            break;
        start = p;
        p = number_scan(p, end, &number, &wrong);
        if (!p) {
            if (wrong == start && (wrong == end || (*wrong != '-' && !is_digit(*wrong))))
                return fail_expected(reader, err, "a number", (size_t)(wrong - reader->text));
            return fail_number(reader, start, wrong, err);
        }
        if (n == max) {
            reader->state = FAILED;
            return error_set(err, ERR_INVALID, "an array of more than %zu numbers, at byte %zu",
                             max, (size_t)(start - reader->text));
        }
        if (!number_float(&number, start, (size_t)(p - start), out + n)) {
            reader->state = FAILED;
            return fail_range(err, "float32", (struct json_span){start, (size_t)(p - start)},
                              (size_t)(start - reader->text));
        }
        n++;
        while (p < end && is_space(*p))
            p++;
        if (p < end && *p == ',') {
            p++;
            continue;
        }
        if (p < end && *p == ']')
            break;
        return fail_expected(reader, err, "',' or ']'", (size_t)(p - reader->text));
    }
    reader->position = (size_t)(p - reader->text);
    pop(reader);
    *count = n;
    return 0;
}

/* ---- small helpers ---- */

bool json_span_is(struct json_span span, const char *text)
{
    return strlen(text) == span.bytes && memcmp(text, span.at, span.bytes) == 0;
}

static int base64_digit(char c)
{
    if (c >= 'A' && c <= 'Z')
        return c - 'A';
    if (c >= 'a' && c <= 'z')
        return c - 'a' + 26;
    if (c >= '0' && c <= '9')
        return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
}

int json_base64_decode(struct json_span span, void *out, size_t out_max, size_t *out_bytes,
                       struct error *err)
{
    uint8_t *put = out;
    size_t n = 0, padding = 0;

    if (span.bytes % 4)
        return error_set(err, ERR_INVALID,
                         "base64 of %zu characters, which is no multiple of 4 (padding missing?)",
                         span.bytes);
    while (padding < 2 && padding < span.bytes && span.at[span.bytes - 1 - padding] == '=')
        padding++;
    for (size_t i = 0; i < span.bytes; i += 4) {
        int keep = i + 4 == span.bytes ? 3 - (int)padding : 3;
        uint32_t group = 0;

        for (int j = 0; j < 4; j++) {
            int digit = j > keep ? 0 : base64_digit(span.at[i + (size_t)j]);
            if (digit < 0)
                return error_set(err, ERR_INVALID, "not base64 at character %zu", i + (size_t)j);
            group = group << 6 | (uint32_t)digit;
        }
        if (group & (0xffffffu >> (8 * keep))) /* bits that no byte takes: two texts, one value */
            return error_set(err, ERR_INVALID, "base64 that ends in stray bits, character %zu", i);
        if (out_max - n < (size_t)keep)
            return error_set(err, ERR_INVALID, "base64 of more than the %zu bytes expected",
                             out_max);
        for (int j = 0; j < keep; j++)
            put[n++] = (uint8_t)(group >> (16 - 8 * j));
    }
    *out_bytes = n;
    return 0;
}
