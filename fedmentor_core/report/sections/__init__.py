"""What each part of the report shows, as plain frozen values: all choices are made here, none in the template."""
