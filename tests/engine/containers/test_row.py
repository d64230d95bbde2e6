from engine.containers.row import BadRecord


def test_a_bad_record_names_its_field():
    assert str(BadRecord("is empty", field="prompt")) == 'field "prompt" is empty'
    assert str(BadRecord("must be one JSON object")) == "must be one JSON object"
