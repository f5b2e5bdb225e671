"""The monitored program of a model beside the user's own: how it is made, chosen and credited."""
