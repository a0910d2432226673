"""What a user gets: values, pictures, and the shapes that captum's and shap's users know."""
