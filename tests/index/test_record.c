/* index/record: JSON rows to records and back, and records that lie. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index/record.h"
#include "storage/base/bytes.h"

#define VECTOR                                                                                     \
    "{\"fieldName\":\"v\",\"dataType\":\"FloatVector\",\"elementTypeParams\":{\"dim\":8}}"
#define INT_KEY "{\"fieldName\":\"id\",\"dataType\":\"Int64\",\"isPrimary\":true}"
#define TEXT_KEY                                                                                   \
    "{\"fieldName\":\"id\",\"dataType\":\"VarChar\",\"isPrimary\":true,"                           \
    "\"elementTypeParams\":{\"max_length\":8}}"

static struct schema *parse(const char *text)
{
    struct error err = ERROR_INIT;
    struct schema *schema = NULL;

    if (schema_parse(text, strlen(text), "s.json", &schema, &err) < 0)
        fail_msg("%s", err.message);
    return schema;
}

/* Key, vector and one field `x` of this type; `more` begins with a comma or is empty. */
static struct schema *with_field(const char *type, const char *more, bool dynamic)
{
    char text[1024];

    snprintf(text, sizeof text,
             "{\"enableDynamicField\":%s,\"fields\":[" INT_KEY "," VECTOR
             ",{\"fieldName\":\"x\",\"dataType\":\"%s\"%s}]}",
             dynamic ? "true" : "false", type, more);
    return parse(text);
}

/* The record in readable form: "102=int 5;name=text abc;..." */
static void describe(const struct record_buffer *record, char *out, size_t room)
{
    static const char *const kinds[] = {"null",   "bool", "int",    "float",
                                        "double", "text", "number", "json"};
    struct record_cursor cursor;
    struct error err = ERROR_INIT;
    struct value value;
    const char *name;
    uint32_t id, name_bytes;
    size_t at = 0;
    int more;
    uint8_t *exact = malloc(record->bytes);

    out[0] = '\0';
    memcpy(exact, record->data, record->bytes);
    if (record_open(exact, record->bytes, &cursor, &err) < 0)
        fail_msg("%s", err.message);
    while ((more = record_next(&cursor, &id, &name, &name_bytes, &value, &err)) > 0) {
        if (id)
            at += (size_t)snprintf(out + at, room - at, "%u=", id);
        else
            at += (size_t)snprintf(out + at, room - at, "%.*s=", (int)name_bytes, name);
        at += (size_t)snprintf(out + at, room - at, "%s", kinds[value.type]);
        if (value.type == VALUE_BOOL)
            at += (size_t)snprintf(out + at, room - at, " %d", value.boolean);
        else if (value.type == VALUE_INT64)
            at += (size_t)snprintf(out + at, room - at, " %lld", (long long)value.integer);
        else if (value.type == VALUE_FLOAT || value.type == VALUE_DOUBLE)
            at += (size_t)snprintf(out + at, room - at, " %.17g", value.real);
        else if (value.type >= VALUE_TEXT)
            at += (size_t)snprintf(out + at, room - at, " %.*s", (int)value.text_bytes, value.text);
        at += (size_t)snprintf(out + at, room - at, ";");
        assert_true(at < room);
    }
    if (more < 0)
        fail_msg("%s", err.message);
    free(exact);
}

static void becomes(const struct schema *schema, const char *json, const char *key,
                    const char *expected)
{
    struct record_buffer record = {0};
    struct error err = ERROR_INIT;
    char found[4096];

    if (record_from_json(schema, json, strlen(json), key, key ? strlen(key) : 0, &record, &err) < 0)
        fail_msg("%s: %s", json, err.message);
    describe(&record, found, sizeof found);
    assert_string_equal(found, expected);
    record_release(&record);
}

static void refused(const struct schema *schema, const char *json, const char *finding)
{
    struct record_buffer record = {0};
    struct error err = ERROR_INIT;

    if (record_from_json(schema, json, strlen(json), NULL, 0, &record, &err) == 0)
        fail_msg("accepted: %.200s", json);
    assert_int_equal(err.code, ERR_INVALID);
    if (!strstr(err.message, finding))
        fail_msg("'%s' is not in '%s'", finding, err.message);
    record_release(&record);
}

static void test_a_row_without_schema_fields_is_all_dynamic(void **state)
{
    struct schema *s = NULL;
    struct error err = ERROR_INIT;

    (void)state;
    assert_int_equal(
        schema_default("id", FIELD_INT64, 0, "vector", FIELD_FLOAT_VECTOR, 8, &s, &err), 0);
    becomes(s, "{\"id\":17,\"photo\":\"x.jpg\",\"area\":54876,\"flip\":true,\"score\":0.53}", NULL,
            "photo=text x.jpg;area=int 54876;flip=bool 1;score=double 0.53000000000000003;");
    becomes(s, "{}", NULL, "");
    becomes(s, " {\"a\\u0062\":\"\\u00e9\\n\", \"n\":null, \"o\":{\"k\": [1, \"\\\"\"]}, \"l\":[]}",
            NULL, "ab=text \xc3\xa9\n;o=json {\"k\": [1, \"\\\"\"]};l=json [];");
    becomes(s, "{\"\":false}", NULL, "=bool 0;");
    refused(s, "{\"a\":1,\"b\":2,\"a\":1}", "field a stands twice");
    refused(s, "{\"a\":null,\"\\u0061\":1}", "field a stands twice");
    refused(s, "{\"id\":1,\"id\":1}", "field id stands twice");
    refused(s, "{\"vector\":[1]}", "field vector is a vector");
    refused(s, "{\"$meta\":{}}", "$meta");
    refused(s, "{\"a\":1e999}", "field a");
    refused(s, "[1]", "an array");
    refused(s, "{\"a\":1} x", "end of the text");
    refused(s, "{\"a\":\"\\ud800\"}", "at byte");
    refused(s, "", "at byte 0");
    schema_free(s);
}

static void test_dynamic_numbers_keep_their_type_and_their_digits(void **state)
{
    struct schema *s = NULL;
    struct error err = ERROR_INIT;

    (void)state;
    assert_int_equal(
        schema_default("id", FIELD_INT64, 0, "vector", FIELD_FLOAT_VECTOR, 8, &s, &err), 0);
    becomes(s, "{\"a\":9223372036854775807,\"b\":-9223372036854775808}", NULL,
            "a=int 9223372036854775807;b=int -9223372036854775808;");
    becomes(s, "{\"a\":9223372036854775808,\"b\":0.1,\"c\":0.10,\"d\":5.0,\"e\":1.25}", NULL,
            "a=number 9223372036854775808;b=double 0.10000000000000001;c=number 0.10;"
            "d=number 5.0;e=double 1.25;");
    becomes(s, "{\"a\":0.1000000000000000055511151231257827,\"b\":1E3}", NULL,
            "a=number 0.1000000000000000055511151231257827;b=number 1E3;");
    schema_free(s);
}

static void test_many_dynamic_keys_are_kept_in_order_and_told_apart(void **state)
{
    struct schema *s = NULL;
    struct error err = ERROR_INIT;
    struct record_buffer record = {0};
    struct record_cursor cursor;
    struct value value;
    const char *name;
    uint32_t id, name_bytes;
    char *json = malloc(80000), expected[16];
    size_t at = 1;

    (void)state;
    assert_int_equal(
        schema_default("id", FIELD_INT64, 0, "vector", FIELD_FLOAT_VECTOR, 8, &s, &err), 0);
    strcpy(json, "{");
    for (int i = 0; i < 5000; i++)
        at += (size_t)sprintf(json + at, "%s\"k%d\":%d", i ? "," : "", i, i);
    strcpy(json + at, "}");
    assert_int_equal(record_from_json(s, json, strlen(json), NULL, 0, &record, &err), 0);
    assert_int_equal(record_open(record.data, record.bytes, &cursor, &err), 0);
    for (int i = 0; i < 5000; i++) {
        assert_int_equal(record_next(&cursor, &id, &name, &name_bytes, &value, &err), 1);
        sprintf(expected, "k%d", i);
        assert_int_equal(name_bytes, strlen(expected));
        assert_memory_equal(name, expected, name_bytes);
        assert_int_equal(value.integer, i);
    }
    assert_int_equal(record_next(&cursor, &id, &name, &name_bytes, &value, &err), 0);
    strcpy(json + at, ",\"k77\":0}");
    refused(s, json, "field k77 stands twice");
    /* Past what a row may hold of them. */
    at = 1;
    for (int i = 0; i < 7000; i++)
        at += (size_t)sprintf(json + at, "%s\"k%d\":0", i ? "," : "", i);
    strcpy(json + at, "}");
    refused(s, json, "dynamic part exceeds max length (65536)");
    free(json);
    record_release(&record);
    schema_free(s);
}

static void test_every_type_converts_as_the_contract_says(void **state)
{
    static const struct {
        const char *type;
        const char *more;
        const char *value;
        const char *expected; /* NULL: refused, naming field x */
    } cases[] = {
        {"Bool", "", "true", "bool 1"},
        {"Bool", "", "\"False\"", "bool 0"},
        {"Bool", "", "\"t\"", "bool 1"},
        {"Bool", "", "1", "bool 1"},
        {"Bool", "", "2", NULL},
        {"Bool", "", "\"yes\"", NULL},
        {"Bool", "", "[]", NULL},
        {"Int8", "", "-128", "int -128"},
        {"Int8", "", "128", NULL},
        {"Int8", "", "\"127\"", "int 127"},
        {"Int8", "", "5.0", "int 5"},
        {"Int8", "", "5.5", NULL},
        {"Int8", "", "1e2", "int 100"},
        {"Int8", "", "1e300", NULL},
        {"Int16", "", "32767", "int 32767"},
        {"Int16", "", "-32769", NULL},
        {"Int32", "", "-2147483648", "int -2147483648"},
        {"Int32", "", "2147483648", NULL},
        {"Int32", "", "2147483648.0", NULL},
        {"Int32", "", "\"5.0\"", NULL},
        {"Int32", "", "true", NULL},
        {"Int64", "", "9223372036854775807", "int 9223372036854775807"},
        {"Int64", "", "\"-9007199254740993\"", "int -9007199254740993"},
        {"Int64", "", "5.0", NULL},
        {"Int64", "", "9223372036854775808", NULL},
        {"Int64", "", "null", NULL},
        {"Float", "", "0.5", "float 0.5"},
        {"Float", "", "\"1e3\"", "float 1000"},
        {"Float", "", "1e39", NULL},
        {"Float", "", "\"nan\"", NULL},
        {"Float", "", "\"\"", NULL},
        {"Float", "", "{}", NULL},
        {"Double", "", "1e39", "double 9.9999999999999994e+38"},
        {"Double", "", "1e999", NULL},
        {"Double", "", "\"1e999\"", NULL},
        {"VarChar", ",\"elementTypeParams\":{\"max_length\":6}", "\"abcdef\"", "text abcdef"},
        {"VarChar", ",\"elementTypeParams\":{\"max_length\":6}", "\"abcdefg\"", NULL},
        {"VarChar", ",\"elementTypeParams\":{\"max_length\":6}", "\"\xc3\xa9\xc3\xa9\xc3\xa9\"",
         "text \xc3\xa9\xc3\xa9\xc3\xa9"},
        {"VarChar", ",\"elementTypeParams\":{\"max_length\":6}", "\"\xc3\xa9\xc3\xa9\xc3\xa9!\"",
         NULL},
        {"VarChar", ",\"elementTypeParams\":{\"max_length\":6}", "12", "text 12"},
        {"VarChar", ",\"elementTypeParams\":{\"max_length\":6}", "true", "text true"},
        {"VarChar", ",\"elementTypeParams\":{\"max_length\":6}", "[1, 2]", "text [1, 2]"},
        {"VarChar", ",\"elementTypeParams\":{\"max_length\":6}", "null", "text "},
        {"VarChar", ",\"nullable\":true,\"elementTypeParams\":{\"max_length\":6}", "null", "null"},
        {"JSON", "", "{\"a\":[1]}", "json {\"a\":[1]}"},
        {"JSON", "", "3.0", "json 3.0"},
        {"JSON", "", "\"{\\\"a\\\":\\\"\\\\n\\\"}\"", "json {\"a\":\"\\n\"}"},
        {"JSON", "", "\"plain\"", "json \"plain\""},
        {"JSON", "", "null", NULL},
        {"JSON", ",\"nullable\":true", "null", "null"},
        {"Array", ",\"elementDataType\":\"Int8\",\"elementTypeParams\":{\"max_capacity\":2}",
         "[1,-128]", "json [1,-128]"},
        {"Array", ",\"elementDataType\":\"Int8\",\"elementTypeParams\":{\"max_capacity\":2}",
         "[1,2,3]", NULL},
        {"Array", ",\"elementDataType\":\"Int8\",\"elementTypeParams\":{\"max_capacity\":2}",
         "[128]", NULL},
        {"Array", ",\"elementDataType\":\"Int8\",\"elementTypeParams\":{\"max_capacity\":2}",
         "[\"1\"]", NULL},
        {"Array", ",\"elementDataType\":\"Int8\",\"elementTypeParams\":{\"max_capacity\":2}",
         "[null]", NULL},
        {"Array", ",\"elementDataType\":\"Int8\",\"elementTypeParams\":{\"max_capacity\":2}", "5",
         NULL},
        {"Array", ",\"elementDataType\":\"Float\",\"elementTypeParams\":{\"max_capacity\":2}",
         "[1e39]", NULL},
        {"Array", ",\"elementDataType\":\"Bool\",\"elementTypeParams\":{\"max_capacity\":2}",
         "[true]", "json [true]"},
        {"Array", ",\"elementDataType\":\"Bool\",\"elementTypeParams\":{\"max_capacity\":2}",
         "[[]]", NULL},
        {"Array",
         ",\"elementDataType\":\"VarChar\",\"elementTypeParams\":{\"max_capacity\":2,"
         "\"max_length\":1}",
         "[\"a\",\"\\n\"]", "json [\"a\",\"\\n\"]"},
        {"Array",
         ",\"elementDataType\":\"VarChar\",\"elementTypeParams\":{\"max_capacity\":2,"
         "\"max_length\":1}",
         "[\"ab\"]", NULL},
        {"Int8", ",\"defaultValue\":-5.7", "null", "int -5"},
        {"Int8", ",\"defaultValue\":5,\"nullable\":true", "null", "int 5"},
        {"Double", ",\"defaultValue\":0.5", "null", "double 0.5"},
        {"Bool", ",\"defaultValue\":true", "null", "bool 1"},
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct schema *s = with_field(cases[i].type, cases[i].more, false);
        char json[256], expected[256];

        snprintf(json, sizeof json, "{\"x\":%s}", cases[i].value);
        if (cases[i].expected) {
            snprintf(expected, sizeof expected, "102=%s;", cases[i].expected);
            becomes(s, json, NULL, expected);
        } else {
            refused(s, json, "field x");
        }
        schema_free(s);
    }
}

static void test_missing_fields_take_default_null_or_an_error(void **state)
{
    struct schema *s = with_field("VarChar",
                                  ",\"defaultValue\":\"\\u00e9\\\"\",\"elementTypeParams\":"
                                  "{\"max_length\":6}",
                                  true);

    (void)state;
    becomes(s, "{\"y\":1}", NULL, "102=text \xc3\xa9\";y=int 1;");
    schema_free(s);
    s = with_field("VarChar", ",\"elementTypeParams\":{\"max_length\":6}", false);
    becomes(s, "{}", NULL, "102=text ;");
    refused(s, "{\"y\":1}", "field y is not in the schema");
    refused(s, "{\"v\":[]}", "field v is a vector");
    schema_free(s);
    s = with_field("Double", "", false);
    refused(s, "{}", "field x (Double) is missing");
    schema_free(s);
    s = with_field("Array",
                   ",\"nullable\":true,\"elementDataType\":\"Bool\",\"elementTypeParams\":"
                   "{\"max_capacity\":2}",
                   false);
    becomes(s, "{}", NULL, "102=null;");
    schema_free(s);
}

static void test_a_text_key_is_stored_first_and_the_callers_wins(void **state)
{
    struct schema *s =
        parse("{\"enableDynamicField\":true,\"fields\":["
              "{\"fieldName\":\"n\",\"dataType\":\"Int8\"}," VECTOR "," TEXT_KEY "]}");
    struct record_buffer record = {0};
    struct error err = ERROR_INIT;

    (void)state;
    becomes(s, "{\"n\":1}", "abc", "102=text abc;100=int 1;");
    becomes(s, "{\"n\":1,\"id\":\"other\"}", "abc", "102=text abc;100=int 1;");
    becomes(s, "{\"n\":1,\"id\":\"own\"}", NULL, "102=text own;100=int 1;");
    becomes(s, "{\"n\":1}", "", "102=text ;100=int 1;");
    refused(s, "{\"n\":1}", "the key field id is missing");
    refused(s, "{\"n\":1,\"id\":null}", "the key field id is missing");
    refused(s, "{\"n\":1,\"id\":\"123456789\"}", "length of varchar field id exceeds max length");
    assert_int_equal(record_from_json(s, "{\"n\":1}", 7, "123456789", 9, &record, &err), -1);
    error_clear(&err);
    assert_int_equal(record_from_json(s, "{\"n\":1}", 7, "\xff", 1, &record, &err), -1);
    assert_non_null(strstr(err.message, "UTF-8"));
    record_release(&record);
    schema_free(s);
}

static void test_large_values_are_refused_by_their_limits(void **state)
{
    struct schema *json_field = with_field("JSON", "", false);
    struct schema *dynamic = with_field("Bool", ",\"nullable\":true", true);
    char *text = malloc(70000);
    struct record_buffer record = {0};
    struct error err = ERROR_INIT;

    (void)state;
    memset(text, 'a', 70000);
    memcpy(text, "{\"x\":\"", 6);
    strcpy(text + 5 + 65535, "\"}"); /* 65536 with the quotes */
    assert_int_equal(record_from_json(json_field, text, strlen(text), NULL, 0, &record, &err), 0);
    memset(text, 'a', 70000);
    memcpy(text, "{\"x\":\"", 6);
    strcpy(text + 5 + 65536, "\"}");
    refused(json_field, text, "json field (x) exceeds max length (65536)");
    memset(text, 'a', 70000);
    memcpy(text, "{\"y\":\"", 6);
    strcpy(text + 65600, "\"}");
    refused(dynamic, text, "dynamic part exceeds");
    free(text);
    record_release(&record);
    schema_free(json_field);
    schema_free(dynamic);
}

static void test_the_same_row_gives_the_same_bytes_in_a_used_buffer(void **state)
{
    struct schema *s = with_field("Float", "", true);
    const char *longer = "{\"x\":1,\"long\":\"........................................\"}";
    const char *json = "{\"b\":[1],\"x\":0.25,\"a\":\"z\"}";
    struct record_buffer used = {0}, fresh = {0};
    struct error err = ERROR_INIT;

    (void)state;
    assert_int_equal(record_from_json(s, longer, strlen(longer), NULL, 0, &used, &err), 0);
    assert_int_equal(record_from_json(s, json, strlen(json), NULL, 0, &used, &err), 0);
    assert_int_equal(record_from_json(s, json, strlen(json), NULL, 0, &fresh, &err), 0);
    assert_int_equal(used.bytes, fresh.bytes);
    assert_memory_equal(used.data, fresh.data, fresh.bytes);
    /* 2 count, 4+1+4 the float, 4+2+1+1+4+3 b, 4+2+1+1+4+1 a */
    assert_int_equal(fresh.bytes, 2 + 9 + 15 + 13);
    record_release(&used);
    record_release(&fresh);
    schema_free(s);
}

static int walk(const uint8_t *data, size_t bytes, struct error *err)
{
    uint8_t *exact = malloc(bytes ? bytes : 1);
    struct record_cursor cursor;
    struct value value;
    const char *name;
    uint32_t id, name_bytes;
    volatile unsigned touched = 0; /* every byte of text is read, for the sanitizer */
    int more = -1;

    memcpy(exact, data, bytes);
    if (record_open(exact, bytes, &cursor, err) == 0)
        while ((more = record_next(&cursor, &id, &name, &name_bytes, &value, err)) > 0) {
            if (value.type == VALUE_FLOAT || value.type == VALUE_DOUBLE)
                assert_true(isfinite(value.real));
            for (uint32_t i = 0; i < value.text_bytes; i++)
                touched = touched + (unsigned char)value.text[i];
        }
    free(exact);
    return more;
}

static void test_a_record_that_lies_is_corrupt(void **state)
{
    struct schema *s = with_field("Double", "", true);
    const char *json = "{\"x\":0.5,\"n\":0.10,\"t\":\"text\",\"b\":true,\"o\":{},\"i\":3}";
    struct record_buffer record = {0};
    struct error err = ERROR_INIT;
    uint8_t copy[256];

    (void)state;
    assert_int_equal(record_from_json(s, json, strlen(json), NULL, 0, &record, &err), 0);
    assert_int_equal(walk(record.data, record.bytes, &err), 0);
    for (size_t cut = 0; cut < record.bytes; cut++) {
        error_clear(&err);
        assert_int_equal(walk(record.data, cut, &err), -1);
        assert_int_equal(err.code, ERR_CORRUPT);
    }
    memcpy(copy, record.data, record.bytes);
    copy[record.bytes] = 0;
    error_clear(&err);
    assert_int_equal(walk(copy, record.bytes + 1, &err), -1); /* a byte too many */
    for (size_t at = 0; at < record.bytes; at++)
        for (unsigned v = 0; v < 256; v++) {
            memcpy(copy, record.data, record.bytes);
            copy[at] = (uint8_t)v;
            error_clear(&err);
            if (walk(copy, record.bytes, &err) < 0)
                assert_int_equal(err.code, ERR_CORRUPT);
        }
    /* An infinite double, a bool of 2, a number that is no number. */
    memcpy(copy, record.data, record.bytes);
    store_f64(copy + 7, (double)INFINITY);
    assert_int_equal(walk(copy, record.bytes, &err), -1);
    memcpy(copy, record.data, record.bytes);
    memcpy(copy + 15 + 12, "true", 4);
    error_clear(&err);
    assert_int_equal(walk(copy, record.bytes, &err), -1);
    assert_non_null(strstr(err.message, "number that is none"));
    record_release(&record);
    schema_free(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_row_without_schema_fields_is_all_dynamic),
        cmocka_unit_test(test_dynamic_numbers_keep_their_type_and_their_digits),
        cmocka_unit_test(test_many_dynamic_keys_are_kept_in_order_and_told_apart),
        cmocka_unit_test(test_every_type_converts_as_the_contract_says),
        cmocka_unit_test(test_missing_fields_take_default_null_or_an_error),
        cmocka_unit_test(test_a_text_key_is_stored_first_and_the_callers_wins),
        cmocka_unit_test(test_large_values_are_refused_by_their_limits),
        cmocka_unit_test(test_the_same_row_gives_the_same_bytes_in_a_used_buffer),
        cmocka_unit_test(test_a_record_that_lies_is_corrupt),
    };

    return cmocka_run_group_tests_name("record", tests, NULL, NULL);
}
