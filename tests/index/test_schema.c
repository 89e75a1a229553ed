/* index/schema: what is accepted, what is refused and how, and that printing round-trips. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index/schema.h"

#define KEY "{\"fieldName\":\"id\",\"dataType\":\"Int64\",\"isPrimary\":true}"
#define VECTOR                                                                                     \
    "{\"fieldName\":\"v\",\"dataType\":\"FloatVector\",\"elementTypeParams\":{\"dim\":8}}"
#define WITH(field) "{\"fields\":[" KEY "," VECTOR "," field "]}"

static struct schema *parse(const char *text)
{
    struct error err = ERROR_INIT;
    struct schema *schema = NULL;

    if (schema_parse(text, strlen(text), "s.json", &schema, &err) < 0)
        fail_msg("%s", err.message);
    return schema;
}

static void refused(const char *text, const char *finding)
{
    struct error err = ERROR_INIT;
    struct schema *schema = NULL;

    if (schema_parse(text, strlen(text), "s.json", &schema, &err) == 0)
        fail_msg("accepted: %s", text);
    assert_null(schema);
    assert_int_equal(err.code, ERR_INVALID);
    assert_int_equal(strncmp(err.message, "s.json: ", 8), 0);
    if (!strstr(err.message, finding))
        fail_msg("'%s' is not in '%s'", finding, err.message);
}

static const char full[] =
    "{\"autoId\":true,\"enableDynamicField\":true,\"description\":\"all \\\"kinds\\\"\","
    "\"functions\":[],\"unknown\":{\"a\":[1]},\"fields\":["
    "{\"fieldName\":\" id \",\"dataType\":\"VarChar\",\"isPrimary\":true,"
    "\"elementTypeParams\":{\"max_length\":\"64\",\"mmap.enabled\":true}},"
    "{\"fieldname\":\"v\",\"DATATYPE\":\"FloatVector\",\"elementTypeParams\":{\"dim\":\"768\"}},"
    "{\"fieldName\":\"b\",\"dataType\":\"BinaryVector\",\"elementTypeParams\":{\"dim\":16}},"
    "{\"fieldName\":\"s\",\"dataType\":\"SparseFloatVector\"},"
    "{\"fieldName\":\"flag\",\"dataType\":\"Bool\",\"defaultValue\":true,\"nullable\":true},"
    "{\"fieldName\":\"i8\",\"dataType\":\"Int8\",\"defaultValue\":-5.7},"
    "{\"fieldName\":\"big\",\"dataType\":\"Int64\",\"defaultValue\":9007199254740993,"
    "\"isPartitionKey\":true},"
    "{\"fieldName\":\"f\",\"dataType\":\"Float\",\"defaultValue\":0.1},"
    "{\"fieldName\":\"d\",\"dataType\":\"Double\",\"defaultValue\":1e-3},"
    "{\"fieldName\":\"t\",\"dataType\":\"VarChar\",\"defaultValue\":\"\\u00e9\","
    "\"elementTypeParams\":{\"max_length\":2},\"isClusteringKey\":true},"
    "{\"fieldName\":\"a\",\"dataType\":\"Array\",\"elementDataType\":\"VarChar\","
    "\"elementTypeParams\":{\"max_length\":9,\"max_capacity\":\"4\"}},"
    "{\"fieldName\":\"j\",\"dataType\":\"JSON\",\"nullable\":true,\"defaultValue\":null}]}";

static void test_every_kind_of_field_is_understood(void **state)
{
    struct schema *s = parse(full);

    (void)state;
    assert_int_equal(s->field_count, 12);
    assert_true(s->dynamic);
    assert_string_equal(s->description, "all \"kinds\"");
    assert_string_equal(schema_key(s)->name, "id");
    assert_int_equal(schema_key(s)->type, FIELD_VARCHAR);
    assert_int_equal(schema_key(s)->max_length, 64);
    assert_true(schema_key(s)->auto_id);
    assert_int_equal(schema_find(s, "v")->dim, 768);
    assert_int_equal(schema_find(s, "v")->id, 101);
    assert_ptr_equal(schema_find_id(s, 101), schema_find(s, "v"));
    assert_ptr_equal(schema_vector(s, 0), schema_find(s, "v"));
    assert_ptr_equal(schema_vector(s, 2), schema_find(s, "s"));
    assert_null(schema_vector(s, 3));
    assert_null(schema_find(s, "nothing"));
    assert_null(schema_find_id(s, 99));
    assert_string_equal(schema_find(s, "i8")->default_json, "-5");
    assert_string_equal(schema_find(s, "big")->default_json, "9007199254740993");
    assert_string_equal(schema_find(s, "f")->default_json, "0.1");
    assert_string_equal(schema_find(s, "d")->default_json, "0.001");
    assert_string_equal(schema_find(s, "flag")->default_json, "true");
    assert_string_equal(schema_find(s, "t")->default_json, "\"\xc3\xa9\"");
    assert_true(schema_find(s, "t")->clustering_key);
    assert_true(schema_find(s, "big")->partition_key);
    assert_true(schema_find(s, "j")->nullable);
    assert_null(schema_find(s, "j")->default_json);
    assert_int_equal(schema_find(s, "a")->element_type, FIELD_VARCHAR);
    assert_int_equal(schema_find(s, "a")->max_capacity, 4);
    assert_false(schema_find(s, "big")->auto_id);
    schema_free(s);
}

static void assert_same(const struct schema *a, const struct schema *b)
{
    assert_int_equal(a->field_count, b->field_count);
    assert_int_equal(a->dynamic, b->dynamic);
    assert_string_equal(a->description, b->description);
    for (uint32_t i = 0; i < a->field_count; i++) {
        struct schema_field x = a->fields[i], y = b->fields[i];

        assert_string_equal(x.default_json ? x.default_json : "",
                            y.default_json ? y.default_json : "");
        x.default_json = y.default_json = NULL;
        assert_memory_equal(&x, &y, sizeof x);
    }
}

static void test_printing_is_canonical_and_parses_back_equal(void **state)
{
    struct schema *first = parse(full), *second;
    char *text, *again;
    size_t bytes;
    struct error err = ERROR_INIT;

    (void)state;
    assert_int_equal(schema_print(first, &text, &bytes, &err), 0);
    assert_int_equal(bytes, strlen(text));
    second = parse(text);
    assert_same(first, second);
    assert_int_equal(schema_print(second, &again, &bytes, &err), 0);
    assert_string_equal(text, again);
    schema_free(first);
    schema_free(second);
    free(text);
    free(again);
}

static void test_the_default_schema_is_key_vector_and_dynamic(void **state)
{
    struct schema *s, *again;
    struct error err = ERROR_INIT;
    char *text;
    size_t bytes;

    (void)state;
    assert_int_equal(
        schema_default("id", FIELD_INT64, 0, "vector", FIELD_FLOAT_VECTOR, 96, &s, &err), 0);
    assert_int_equal(schema_print(s, &text, &bytes, &err), 0);
    assert_string_equal(text, "{\"autoID\":false,\"enableDynamicField\":true,\"fields\":["
                              "{\"fieldName\":\"id\",\"dataType\":\"Int64\",\"isPrimary\":true},"
                              "{\"fieldName\":\"vector\",\"dataType\":\"FloatVector\","
                              "\"elementTypeParams\":{\"dim\":\"96\"}}]}");
    again = parse(text);
    assert_same(s, again);
    free(text);
    schema_free(s);
    schema_free(again);

    assert_int_equal(
        schema_default("name", FIELD_VARCHAR, 128, "v", FIELD_INT8_VECTOR, 32, &s, &err), 0);
    assert_int_equal(schema_key(s)->max_length, 128);
    schema_free(s);

    assert_int_equal(schema_default("id", FIELD_FLOAT, 0, "v", FIELD_FLOAT_VECTOR, 8, &s, &err),
                     -1);
    assert_int_equal(err.code, ERR_INVALID);
    error_clear(&err);
    assert_int_equal(schema_default("id", FIELD_INT64, 0, "id", FIELD_FLOAT_VECTOR, 8, &s, &err),
                     -1);
    assert_non_null(strstr(err.message, "duplicated field name id"));
    error_clear(&err);
    assert_int_equal(schema_default("id", FIELD_INT64, 0, "v", FIELD_FLOAT_VECTOR, 1, &s, &err),
                     -1);
    error_clear(&err);
    assert_int_equal(schema_default("id", FIELD_INT64, 0, "v", FIELD_JSON, 8, &s, &err), -1);
    error_clear(&err);
    assert_int_equal(schema_default("and", FIELD_INT64, 0, "v", FIELD_FLOAT_VECTOR, 8, &s, &err),
                     -1);
    error_clear(&err);
    assert_int_equal(schema_default("id", FIELD_VARCHAR, 0, "v", FIELD_FLOAT_VECTOR, 8, &s, &err),
                     -1);
    assert_null(s);
}

static void test_types_have_the_names_and_numbers_of_the_contract(void **state)
{
    enum field_type type = FIELD_NONE;
    struct error err = ERROR_INIT;

    (void)state;
    assert_string_equal(field_type_name(FIELD_BFLOAT16_VECTOR), "BFloat16Vector");
    assert_null(field_type_name((enum field_type)20));
    assert_int_equal(field_type_parse("SparseFloatVector", &type, &err), 0);
    assert_int_equal(type, 104);
    assert_true(field_type_is_vector(type));
    assert_false(field_type_is_vector(FIELD_JSON));
    assert_int_equal(field_type_parse("VARCHAR", &type, &err), -1);
    assert_string_equal(err.message, "data type VARCHAR is invalid(case sensitive), did you mean "
                                     "VarChar?");
    error_clear(&err);
    assert_int_equal(field_type_parse("String", &type, &err), -1);
    assert_non_null(strstr(err.message, "VarChar"));
    error_clear(&err);
    assert_int_equal(field_type_parse("Quaternions everywhere, and then some more", &type, &err),
                     -1);
    assert_null(strstr(err.message, "did you mean"));
}

static void test_a_schema_as_a_whole_is_checked(void **state)
{
    (void)state;
    refused("", "at byte 0");
    refused("[]", "an array");
    refused("{\"fields\":[" KEY "," VECTOR "]} x", "end of the text");
    refused("{}", "primary key is not specified");
    refused("{\"fields\":[" VECTOR "]}", "primary key is not specified");
    refused("{\"fields\":[" KEY "]}", "schema does not contain vector field");
    refused("{\"fields\":[" KEY "," VECTOR "," VECTOR "]}", "duplicated field name v");
    refused(WITH("{\"fieldName\":\"k\",\"dataType\":\"Int64\",\"isPrimary\":true}"),
            "more than one primary key");
    refused("{\"autoID\":true,\"autoId\":true,\"fields\":[" KEY "," VECTOR "]}", "stands twice");
    refused("{\"x\":1,\"x\":2,\"fields\":[" KEY "," VECTOR "]}", "key 'x' stands twice");
    refused("{\"autoID\":1,\"fields\":[" KEY "," VECTOR "]}", "autoID");
    refused("{\"functions\":[{}],\"fields\":[" KEY "," VECTOR "]}", "functions");
    refused("{\"fields\":{}}", "fields");
    refused("{\"fields\":[7]}", "fields[0]");
}

static void test_each_field_is_checked(void **state)
{
    static const struct {
        const char *text;
        const char *finding;
    } cases[] = {
        {WITH("{\"dataType\":\"Int8\"}"), "fields[2]: field name should not be empty"},
        {WITH("{\"fieldName\":\"1a\",\"dataType\":\"Int8\"}"), "underscore or letter"},
        {WITH("{\"fieldName\":\"a b\",\"dataType\":\"Int8\"}"), "can only contain"},
        {WITH("{\"fieldName\":\"AND\",\"dataType\":\"Int8\"}"), "reserved"},
        {WITH("{\"fieldName\":\"$meta\",\"dataType\":\"Int8\"}"), "reserved"},
        {WITH("{\"fieldName\":\"a\"}"), "field a: dataType is missing"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"int8\"}"), "did you mean Int8?"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"VarChar\"}"), "type param(max_length)"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"VarChar\",\"elementTypeParams\":"
              "{\"max_length\":65536}}"),
         "(0, 65535], but got 65536"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"VarChar\",\"elementTypeParams\":"
              "{\"max_length\":\"x\"}}"),
         "type param `max_length` is \"x\""},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"FloatVector\"}"), "check type param `dim`"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"FloatVector\",\"elementTypeParams\":"
              "{\"dim\":1}}"),
         "invalid dimension: 1. should be in range 2 ~ 32768"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"FloatVector\",\"elementTypeParams\":"
              "{\"dim\":8,\"dim\":9}}"),
         "key 'dim' stands twice"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"BinaryVector\",\"elementTypeParams\":"
              "{\"dim\":12}}"),
         "multiple of 8"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"SparseFloatVector\",\"elementTypeParams\":"
              "{\"dim\":12}}"),
         "sparse vector"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"Int8Vector\",\"nullable\":true}"),
         "vector type not support null"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"Array\",\"elementDataType\":\"JSON\"}"),
         "element type JSON is not supported"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"Array\"}"), "elementDataType is missing"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"Array\",\"elementDataType\":\"Int8\"}"),
         "max_capacity"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"Array\",\"elementDataType\":\"Int8\","
              "\"elementTypeParams\":{\"max_capacity\":4097}}"),
         "(0, 4096]"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"Int8\",\"defaultValue\":128}"),
         "convert defaultValue fail, err: 128 is out of the range of Int8"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"Int64\",\"defaultValue\":9223372036854775808}"),
         "out of the range of Int64"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"Int8\",\"defaultValue\":\"1\"}"),
         "convert defaultValue fail"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"Float\",\"defaultValue\":1e39}"),
         "convert defaultValue fail"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"JSON\",\"defaultValue\":{}}"),
         "convert defaultValue fail"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"VarChar\",\"defaultValue\":\"abc\","
              "\"elementTypeParams\":{\"max_length\":2}}"),
         "longer than max_length 2"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"Bool\",\"isPartitionKey\":true}"),
         "data type of partition key"},
        {WITH("{\"fieldName\":\"a\",\"dataType\":\"Int64\",\"isPartitionKey\":true,"
              "\"nullable\":true}"),
         "partition key field not support nullable"},
        {"{\"fields\":[{\"fieldName\":\"k\",\"dataType\":\"Int32\",\"isPrimary\":true}]}",
         "primary key should be Int64 or VarChar"},
        {"{\"fields\":[{\"fieldName\":\"k\",\"dataType\":\"Int64\",\"isPrimary\":true,"
         "\"nullable\":true}]}",
         "primary field not support null"},
        {"{\"fields\":[{\"fieldName\":\"k\",\"dataType\":\"Int64\",\"isPrimary\":true,"
         "\"defaultValue\":1}]}",
         "primary field not support default_value"},
        {"{\"fields\":[{\"fieldName\":\"k\",\"dataType\":\"Int64\",\"isPrimary\":true,"
         "\"isPartitionKey\":true}]}",
         "partition key"},
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        refused(cases[i].text, cases[i].finding);
}

static void test_counts_and_sizes_are_bounded(void **state)
{
    static char text[2 * SCHEMA_BYTES_MAX];
    size_t at;
    struct schema *s;

    (void)state;
    at = (size_t)sprintf(text, "{\"fields\":[" KEY "," VECTOR);
    for (int i = 2; i < 64; i++)
        at += (size_t)sprintf(text + at, ",{\"fieldName\":\"f%d\",\"dataType\":\"Bool\"}", i);
    strcpy(text + at, "]}");
    s = parse(text);
    assert_int_equal(s->field_count, 64);
    assert_int_equal(s->fields[63].id, 163);
    schema_free(s);
    strcpy(text + at, ",{\"fieldName\":\"one\",\"dataType\":\"Bool\"}]}");
    refused(text, "limited to 64");

    at = (size_t)sprintf(text, "{\"fields\":[" KEY);
    for (int i = 0; i < 5; i++)
        at += (size_t)sprintf(text + at,
                              ",{\"fieldName\":\"v%d\",\"dataType\":\"Int8Vector\","
                              "\"elementTypeParams\":{\"dim\":8}}",
                              i);
    strcpy(text + at, "]}");
    refused(text, "limited to 4");

    memset(text, 'n', 400);
    at = (size_t)sprintf(text, "{\"fields\":[{\"dataType\":\"Bool\",\"fieldName\":\"");
    text[at] = 'n';
    strcpy(text + 400, "\"}]}");
    refused(text, "less than 255");

    at = (size_t)sprintf(text, "{");
    for (int i = 0; i < 70; i++)
        at += (size_t)sprintf(text + at, "\"k%d\":0,", i);
    strcpy(text + at, "\"z\":0}");
    refused(text, "more than 64 keys");

    memset(text, ' ', SCHEMA_BYTES_MAX + 1);
    text[SCHEMA_BYTES_MAX + 1] = 0;
    refused(text, "65537 bytes");
}

static void test_no_cut_or_changed_text_does_harm(void **state)
{
    char copy[sizeof full];
    size_t bytes = sizeof full - 1;

    (void)state;
    for (size_t cut = 0; cut < bytes; cut++) {
        struct schema *s = NULL;
        char *exact = malloc(cut ? cut : 1);

        memcpy(exact, full, cut);
        assert_int_equal(schema_parse(exact, cut, "x", &s, NULL), -1);
        free(exact);
    }
    for (size_t at = 0; at < bytes; at++)
        for (const char *c = "\"\\{}[],:0-\x80\x01"; *c; c++) {
            struct schema *s = NULL;

            memcpy(copy, full, sizeof full);
            copy[at] = *c;
            if (schema_parse(copy, bytes, "x", &s, NULL) == 0)
                schema_free(s);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_kind_of_field_is_understood),
        cmocka_unit_test(test_printing_is_canonical_and_parses_back_equal),
        cmocka_unit_test(test_the_default_schema_is_key_vector_and_dynamic),
        cmocka_unit_test(test_types_have_the_names_and_numbers_of_the_contract),
        cmocka_unit_test(test_a_schema_as_a_whole_is_checked),
        cmocka_unit_test(test_each_field_is_checked),
        cmocka_unit_test(test_counts_and_sizes_are_bounded),
        cmocka_unit_test(test_no_cut_or_changed_text_does_harm),
    };

    return cmocka_run_group_tests_name("schema", tests, NULL, NULL);
}
